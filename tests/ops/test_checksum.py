"""Checksums depend on every value and its place."""

import pytest
import torch

from learnkv.ops import checksum as module
from learnkv.ops.checksum import checksum


def test_any_change_is_noticed() -> None:
    values = [torch.randn(40, 30), torch.randn(7)]
    before = checksum(values)
    assert checksum([one.clone() for one in values]) == before
    for place in (0, 17, 1199):
        changed = values[0].clone()
        changed.view(-1)[place] = changed.view(-1)[place].nextafter(torch.tensor(9.0))
        assert checksum([changed, values[1]]) != before
    assert checksum(values[::-1]) != before
    assert checksum([values[0].flip(0), values[1]]) != before
    assert checksum([2 * one for one in values]) != before


def test_a_large_tensor_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    monkeypatch.setattr(module, "_PIECE", 64)
    assert checksum([values]) == checksum(values.split(64))


def test_types_and_layouts() -> None:
    half = torch.randn(8, 6).bfloat16()
    assert checksum([half]) == checksum([half.float()])
    assert checksum([half.T]) == checksum([half.T.contiguous()])
    assert checksum([]) == checksum([torch.empty(3, device="meta")]) == 0
