"""Exports and checkpoints whose bytes have changed, and policies' files of strangers, are refused in one line."""

import json
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import eval
from support.models import attached, policy_for

from learnkv import load_policy, save_policy
from learnkv.errors import UserError
from learnkv.formats import seal
from learnkv.inference.models import describe_model
from learnkv.persistence.policies import build_policy

KNORM = {"class_path": "learnkv.scorers.Knorm"}


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    return save_policy(
        policy_for("tokens", attached("llama")), tmp_path / "policy", model=describe_model(attached("llama"))
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    policy = policy_for("tokens", attached("llama"))
    description = {"format_version": 1, "policy": policy.spec(), "model": describe_model(attached("llama"))}
    state = {f"policy.{name}": weight for name, weight in policy.state_dict().items()}
    torch.save({"learnkv": description, "state_dict": state}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def flip(file: Any, index: int) -> None:
    content = bytearray(file.read_bytes())
    content[index] ^= 1
    file.write_bytes(bytes(content))


def test_a_changed_weight_of_an_export_is_noticed(folder: Any) -> None:
    load_policy(folder)
    flip(folder / "policy.safetensors", -3)
    with pytest.raises(UserError, match=r"policy.safetensors: has changed since the export"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["policy.yaml", "budgets.csv"])
def test_a_changed_text_of_an_export_is_noticed(name: Any, folder: Any) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(
        text.replace("sinks: 4", "sinks: 5") if name == "policy.yaml" else text.replace("1", "2")
    )
    with pytest.raises(UserError, match=f"{name}: has changed since the export"):
        load_policy(folder)


def test_an_older_export_has_no_digests(folder: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "budgets.csv").write_text("")
    load_policy(folder)


@pytest.mark.parametrize("sealed", [False, True])
def test_a_changed_checkpoint_is_noticed(checkpoint: Any, sealed: Any) -> None:
    if sealed:
        seal.seal(checkpoint)
    load_policy(checkpoint)
    with zipfile.ZipFile(checkpoint) as archive:
        part = next(info for info in archive.infolist() if "/data/" in info.filename)
    flip(checkpoint, part.header_offset + 30 + len(part.filename) + 70)
    if not sealed and seal.fault(checkpoint) is None:
        pytest.skip("the byte was padding")
    with pytest.raises(UserError, match=r"last.ckpt: its bytes have changed since it was written"):
        load_policy(checkpoint)


class Payload:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize("how", ["torch", "pickle", "legacy"])
def test_a_pickle_is_refused_without_advice(
    how: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    file = tmp_path / "last.ckpt"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"learnkv": Payload()}))
    else:
        torch.save({"learnkv": Payload()}, file, _use_new_zipfile_serialization=how == "torch")
    assert eval([f"ckpt={file}", "tasks=niah_single_1", f"output={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert "not a checkpoint of learnkv's train.py" in captured.err
    assert "weights_only" not in captured.err
    assert not any("weights_only" in str(warning.message) for warning in recwarn)
    assert "trust" not in captured.err
    assert "ran" not in captured.out


def test_a_bomb_in_a_checkpoint_is_refused(checkpoint: Any) -> None:
    content = torch.load(checkpoint, weights_only=True)
    bomb = [1]
    for _ in range(40):
        bomb = [bomb, bomb]
    content["learnkv"]["policy"]["sinks"] = bomb
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match="its aliases stand for more"):
        load_policy(checkpoint)


def test_a_bomb_in_a_policy_is_refused_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    (tmp_path / "bomb.yaml").write_text(text)
    assert eval([f"ckpt={tmp_path / 'bomb.yaml'}", "tasks=niah_single_1"]) == 2
    assert "its aliases stand for more" in capsys.readouterr().err
    assert eval([f"config={tmp_path / 'bomb.yaml'}"]) == 2
    assert "its aliases stand for more" in capsys.readouterr().err


def test_a_config_that_extends_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("config: a.yaml")
    assert eval([f"config={tmp_path / 'a.yaml'}"]) == 2
    assert "extends more than 16 files, or itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spec",
    [
        {"scorer": "stranger.Scorer"},
        {"scorer": KNORM, "allocator": "stranger.Scorer"},
        {"scorer": {"class_path": "learnkv.scorers.Chunked", "init_args": {"base": "stranger.Scorer"}}},
        {"scorer": KNORM, "decode": {"class_path": "stranger.Scorer"}},
    ],
)
def test_no_module_of_a_stranger_is_imported(spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"names the class stranger\.Scorer; only learnkv's own are built"):
        build_policy(yaml.safe_load(yaml.safe_dump(spec)))
    assert "stranger" not in sys.modules


def test_a_component_may_be_named_by_its_path_alone() -> None:
    assert build_policy({"scorer": "learnkv.scorers.Knorm"}).spec() == build_policy({"scorer": KNORM}).spec()


def test_sizes_of_a_stranger_are_compared_before_anything_is_allocated(folder: Path) -> None:
    """A policy of a terabyte is a line, and soon."""

    text = (folder / "policy.yaml").read_text()
    assert "num_layers: " in text
    (folder / "policy.yaml").write_text(re.sub(r"num_layers: \d+", f"num_layers: {1 << 32}", text))
    with pytest.raises(UserError, match=r"weight .* has shape .*, the policy expects .*4294967296"):
        load_policy(folder)
