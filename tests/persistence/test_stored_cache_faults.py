"""Stored caches that are damaged, foreign or newer, and saving that fails: one line, and nothing is lost."""

import errno
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support.models import attached, build, tokens
from transformers import PreTrainedModel

from learnkv import Policy, continuation, load_cache, load_model, prefill, save_cache
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.reader import Reader
from learnkv.errors import RunError, UserError
from learnkv.persistence import stored_cache
from learnkv.persistence.stored_manifest import seal_manifest
from learnkv.scorers import SnapKV

SNAPKV = Policy(SnapKV(window=8))


def compressed(model: PreTrainedModel, keep: float = 0.3, seed: int = 0) -> CompressedCache:
    return SNAPKV.compress(prefill(model, tokens(1, 60, seed), policies=[SNAPKV]), keep=keep)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_cache(compressed(attached("llama")), tmp_path / "cache")


def data_file(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


def assert_refused(folder: Path, expected: str, model: PreTrainedModel | None = None, **arguments: Any) -> None:
    with pytest.raises(UserError, match=expected) as refusal:
        load_cache(folder, attached("llama") if model is None else model, **arguments)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_changed_bytes(folder: Path) -> None:
    file = data_file(folder)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert_refused(folder, "has changed since it was written")


@pytest.mark.parametrize("part", [0, 100])
def test_a_shorter_file(folder: Path, part: int) -> None:
    file = data_file(folder)
    file.write_bytes(file.read_bytes()[:part])
    assert_refused(folder, "has changed since it was written")


def test_a_missing_file(folder: Path) -> None:
    data_file(folder).unlink()
    assert_refused(folder, "cannot be read: No such file")


def change(folder: Path, edit: Callable[[dict[str, Any]], object], sealed: bool = True) -> None:
    """Edit the manifest; `sealed` gives it the digest of a file that was meant so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    manifest.pop("digest") if sealed else None
    (folder / "manifest.json").write_text(json.dumps(seal_manifest(manifest) if sealed else manifest))


def test_a_changed_manifest(folder: Path) -> None:
    change(folder, lambda manifest: manifest["cache"]["prompt_lengths"].append(3), sealed=False)
    assert_refused(folder, "its digest is another")


def test_a_newer_format(folder: Path) -> None:
    change(folder, lambda manifest: manifest.update(format_version=2), sealed=False)
    assert_refused(folder, r"format version 2, expected 1; learnkv .* is older than the file")


def test_another_kind_of_folder(folder: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", "expected a folder of learnkv.save_cache")
    (folder / "manifest.json").write_text('{"format_version": 1}')
    assert_refused(folder, "of something else")
    (folder / "manifest.json").write_text("{")
    assert_refused(folder, "expected JSON")


@pytest.mark.parametrize(
    "edit",
    [
        lambda cache: cache["layers"].pop(),
        lambda cache: cache["layers"][0].update(sizes=[2]),
        lambda cache: cache["layers"][0]["segment"].update(keys="keys99/0"),
        lambda cache: cache["layers"][0]["segment"].update(longest=1),
        lambda cache: cache["layers"][0]["segment"].update(positions=cache["layers"][0]["segment"]["tables"]),
        lambda cache: cache.update(sizes={}),
        lambda cache: cache.pop("pending"),
    ],
)
def test_a_manifest_of_a_stranger(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    change(folder, lambda manifest: edit(manifest["cache"]))
    assert_refused(folder, "do not belong together")


def test_a_class_of_a_stranger(folder: Path) -> None:
    spec = {"class_path": "os.system", "init_args": {}}
    change(folder, lambda manifest: manifest.update(components=[{"kind": "codec", "spec": spec, "tables": None}]))
    assert_refused(folder, "names the class os.system")


def test_nothing_is_unpickled(folder: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "harm"),)

    file = folder / "entries-0.safetensors"
    file.write_bytes(pickle.dumps(Harm()))
    digest = stored_cache.file_digest(file)
    change(folder, lambda manifest: manifest.update(entries=file.name, sha256=digest))
    assert_refused(folder, "cannot be read")
    assert not (folder / "harm").exists()


def test_models_that_did_not_read_it(folder: Path) -> None:
    assert_refused(folder, "was read by the model .* not by", build("qwen3"))
    assert_refused(folder, "was read in float32, .* load it with dtype=float32", build("llama").to(torch.bfloat16))
    assert_refused(folder, "another RoPE", build("llama", rope_theta=5000.0))
    other = build("llama")
    load_cache(folder, other)
    other.model.layers[1].mlp.up_proj.weight.data.add_(0.01)  # no version counter notices that
    assert_refused(folder, "another model of this shape", other)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.sub_(0.01)
    assert_refused(folder, "another model of this shape", other)


def test_another_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_model("reference")
    cache = prefill(model, tokenizer("Rain fell on the hills.", return_tensors="pt").input_ids)
    folder = save_cache(cache, tmp_path, tokenizer=tokenizer)
    load_cache(folder, model, tokenizer=tokenizer)
    load_cache(folder, model)
    tokenizer.add_tokens(["hills"])
    assert_refused(folder, "tokenised by another tokenizer", model, tokenizer=tokenizer)


def test_what_is_not_stored(tmp_path: Path) -> None:
    model = attached("llama")
    online = Policy(SnapKV(window=8), evict_interval=16)
    cache = prefill(model, tokens(1, 60), policies=[online, SNAPKV])
    with pytest.raises(UserError, match="evict_interval=16: online eviction is not stored"):
        save_cache(online.compress(cache.fork(), keep=0.3), tmp_path)
    with pytest.raises(UserError, match="a cache in training"):
        save_cache(SNAPKV.relax(cache, keep=0.3), tmp_path)
    cache.read_by = Reader()
    with pytest.raises(UserError, match="the model that read this cache is not alive"):
        save_cache(cache, tmp_path)
    assert not list(tmp_path.iterdir())


def assert_unchanged(folder: Path) -> None:
    expected = continuation(attached("llama"), tokens(1, 2), compressed(attached("llama")))
    assert torch.equal(continuation(attached("llama"), tokens(1, 2), load_cache(folder, attached("llama"))), expected)


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(tensors: object, path: Path) -> None:
        path.write_bytes(b"the beginning")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    names = set(folder.iterdir())
    monkeypatch.setattr(stored_cache, "save_file", no_space)
    with pytest.raises(RunError, match="no space left on disk; what the folder held before is unchanged"):
        save_cache(compressed(attached("llama"), keep=0.5), folder)
    assert set(folder.iterdir()) == names
    assert_unchanged(folder)


def test_a_write_that_fails(folder: Path) -> None:
    names, larger = set(folder.iterdir()), compressed(attached("llama"), keep=0.5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # of a file, in bytes
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*File too large"):
            save_cache(larger, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(folder.iterdir()) == names
    assert_unchanged(folder)


@pytest.mark.parametrize("call", [1, 2])
def test_an_end_while_saving(folder: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flush(path: Path) -> None:
        calls.append(path)
        if len(calls) == call:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(stored_cache, "_flush", flush)
    with pytest.raises(RunError, match="no space left"):
        save_cache(compressed(attached("llama"), keep=0.5), folder)
    monkeypatch.undo()
    assert_unchanged(folder)
    larger = compressed(attached("llama"), keep=0.5)
    save_cache(larger, folder)  # and what was left over is gone
    assert len(list(folder.iterdir())) == 2
    assert load_cache(folder, attached("llama")).nbytes == larger.nbytes


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "entries-mine.safetensors").write_text("")
    save_cache(compressed(attached("llama")), tmp_path)
    assert (tmp_path / "entries-mine.safetensors").exists()
    (tmp_path / "manifest.json").write_text('{"format_version": 1, "model": {}}')
    with pytest.raises(UserError, match=r"folder=.*: holds something else"):
        save_cache(compressed(attached("llama")), tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"folder=.*: expected a folder that can be written"):
        save_cache(compressed(attached("llama")), tmp_path / "file")


def test_a_cache_is_replaced_while_another_program_loads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, larger = stored_cache.read_manifest, compressed(attached("llama"), keep=0.5)

    def replaced_after_reading(path: Path) -> dict[str, Any]:
        manifest = read(path)
        monkeypatch.undo()
        save_cache(larger, folder)
        return manifest

    before = load_cache(folder, attached("llama"))
    monkeypatch.setattr(stored_cache, "read_manifest", replaced_after_reading)
    assert load_cache(folder, attached("llama")).nbytes == larger.nbytes
    expected = continuation(attached("llama"), tokens(1, 2), compressed(attached("llama")))
    assert torch.equal(continuation(attached("llama"), tokens(1, 2), before), expected)  # its file is mapped still
