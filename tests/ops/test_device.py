"""Numbers reach a device without the host waiting for it; tests/gpu asks the device itself."""

import ast
from pathlib import Path

import pytest
import torch

import learnkv
from learnkv.ops.device import upload

PACKAGE = Path(learnkv.__file__).parent
PATH = [
    "policy/policy.py",
    "cache/compressed_cache.py",
    "cache/layer.py",
    "cache/storage.py",
    "allocators/conditioning.py",
    "allocators/adakv.py",
]
PATH += [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("ops/**/*.py")]


def waiting_copies(source: str) -> list[int]:
    """Lines on which a tensor is made from numbers of the host on another device, which waits for it."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    made = [one for one in calls if ast.unparse(one.func) in ("torch.tensor", "torch.as_tensor")]
    return [one.lineno for one in made if any(word.arg == "device" for word in one.keywords)]


@pytest.mark.parametrize("file", PATH)
def test_compression_and_decoding_upload(file: str) -> None:
    assert waiting_copies((PACKAGE / file).read_text(encoding="utf-8")) == []


def test_the_breach_is_found() -> None:
    assert waiting_copies("x = 1\ny = torch.tensor([1], device=d)\nz = torch.tensor([1])") == [2]


def test_upload() -> None:
    one = upload([1, 2], torch.device("cpu"))
    assert one.dtype == torch.int64
    assert one.tolist() == [1, 2]
    assert upload([0.1], torch.device("cpu"), torch.float64).item() == 0.1
