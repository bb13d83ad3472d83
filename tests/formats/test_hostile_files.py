"""Files of strangers: bombs, broken bytes and deep nesting are one line, and soon."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from learnkv.errors import UserError
from learnkv.formats import seal
from learnkv.formats.files import MAX_DEPTH, check_size, file_digest, make_folder, read_json, read_tensors, read_yaml
from learnkv.formats.files import read_text as read_text_file

ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 25))
HOSTILE = {
    "aliases": (ALIASES, "its aliases stand for more"),
    "merges": (MERGES, "its aliases stand for more"),
    "an alias in its own anchor": ("a: &a [*a]", "nested deeper"),
    "nesting": ("[" * 80 + "]" * 80, "nested deeper"),
    "deep nesting": ("[" * 20_000, "nested deeper"),
    "nested mappings": ("".join(" " * i + f"k{i}:\n" for i in range(100)), "nested deeper"),
    "size": ("a: " + "x" * (1 << 20), "expected at most 1,048,576 bytes"),
    "a Python object": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor .* in line 1"),
    "no YAML": ("a: [1", "expected ',' or ']'"),
    "no text": ("a: \x00", "special characters are not allowed"),
    "a key twice": ("scorer: a\nsinks: 1\nscorer: b", "key 'scorer' twice"),
    "no date": ("a: 2020-99-99", "expected YAML"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_refused_soon(kind: Any, tmp_path: Path) -> None:
    text, line = HOSTILE[kind]
    (tmp_path / "a.yaml").write_text(text)
    begun = time.monotonic()
    with pytest.raises(UserError, match=line) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert time.monotonic() - begun < 30
    assert "\n" not in str(caught.value)


def test_ordinary_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: &b {x: [1, 2.5, null, yes]}\nother: *b\nmore: {<<: *b, y: a}\n")
    base = {"x": [1, 2.5, None, True]}
    assert read_yaml(tmp_path / "a.yaml") == {"base": base, "other": base, "more": {**base, "y": "a"}}
    (tmp_path / "a.yaml").write_text("# nothing")
    assert read_yaml(tmp_path / "a.yaml") is None


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 500, 100_000])
def test_nested_json_is_refused(depth: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * depth + "]" * depth)
    with pytest.raises(UserError, match=r"a.json: (is nested deeper|expected JSON)"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(UserError, match=r"a.json: expected JSON: .*key 'a' twice"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"a": [[1], {"b": 2}]}))
    assert read_json(tmp_path / "a.json") == {"a": [[1], {"b": 2}]}


def test_shared_containers_are_counted_wherever_they_occur() -> None:
    bomb: list[Any] = [1]
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(UserError, match="its aliases stand for more"):
        check_size(bomb, "spec")
    loop: dict[str, Any] = {}
    loop["a"] = loop
    with pytest.raises(UserError, match="nested deeper"):
        check_size(loop, "spec")


def test_sizes_are_limited_and_latin_1_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xe9" * 10)
    with pytest.raises(UserError, match="at most 9 bytes"):
        read_text_file(tmp_path / "a", 9)
    with pytest.raises(UserError, match="not text"):
        read_text_file(tmp_path / "a", 10)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}", b"\x40\0\0\0\0\0\0\0" + b"[" * 64]
)
def test_broken_safetensors_are_one_line(content: Any, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    if content[:1] == b"\x02":
        assert read_tensors(tmp_path / "a.safetensors") == {}
        return
    with pytest.raises(UserError, match=r"a.safetensors: cannot be read") as caught:
        read_tensors(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_every_changed_byte_of_a_sealed_checkpoint_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"a": torch.arange(6.0), "b": [1, "x"]}, file)
    assert seal.fault(file) is None
    seal.seal(file)
    assert seal.fault(file) is None
    assert torch.load(file, weights_only=True)["b"] == [1, "x"]
    good = file.read_bytes()
    for index in range(0, len(good), 3):
        file.write_bytes(good[:index] + bytes([good[index] ^ 4]) + good[index + 1 :])
        assert seal.fault(file), index
    for end in (len(good) - 1, len(good) - 200):
        file.write_bytes(good[:end])
        assert seal.fault(file) or end < len(good) - 100  # cut archives are refused by torch


def test_checkpoints_without_a_digest_have_checksums(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    torch.save({"a": torch.arange(600.0)}, file)
    good = file.read_bytes()
    middle = len(good) // 2
    file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    assert "bytes have changed" in seal.fault(file)


def test_a_digest_follows_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    before = file_digest(file)
    file.rename(tmp_path / "b")
    assert file_digest(tmp_path / "b") == before
    (tmp_path / "b").write_text("two")
    assert file_digest(tmp_path / "b") != before


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"output=.*: expected a folder that can be written .*read-only"):
        make_folder(tmp_path, "output")
