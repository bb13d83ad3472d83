"""Rotations undone, and continued beyond the prompt."""

from typing import Any

import pytest
import torch

from learnkv.ops.rotary import Layout, Rotary

DIM, SLOTS = 32, 300
HALVES, PAIRS = Layout.halves(DIM // 2), Layout.interleaved(DIM // 2)
LAYOUTS = [HALVES, PAIRS, Layout.halves(DIM // 2, start=8), Layout.interleaved(DIM // 2, start=8)]


def table(start: int, stop: int, size: float = 1.0, base: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, S, F]."""
    frequency = base ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angle = torch.arange(start, stop).unsqueeze(-1) * frequency
    return size * angle.cos().unsqueeze(0), size * angle.sin().unsqueeze(0)


def rotary(cos: torch.Tensor, sin: torch.Tensor, chunk: int = SLOTS, layout: Layout = HALVES) -> Rotary:
    return Rotary(tuple(zip(cos.split(chunk, 1), sin.split(chunk, 1), strict=True)), layout)


@pytest.mark.parametrize("chunk", [SLOTS, 290, 20, 7, 1])
@pytest.mark.parametrize("size", [1.0, 1.3])
@pytest.mark.parametrize(("layout", "channels"), [(HALVES, DIM), *((layout, DIM + 8) for layout in LAYOUTS)])
def test_unrotate_undoes_rotate_for_the_last_slots(size: Any, layout: Any, channels: Any, chunk: Any) -> None:
    cos, sin = (part.float() for part in table(0, SLOTS, size))
    before = torch.randn(2, 3, 20, channels, generator=torch.Generator().manual_seed(0))
    after = layout.rotate(before, cos[:, -20:].unsqueeze(1), sin[:, -20:].unsqueeze(1))
    torch.testing.assert_close(rotary(cos, sin, chunk, layout).unrotate(after), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(layout.rest(after), layout.rest(before))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_rotated_as_complex_numbers(layout: Any) -> None:
    cos, sin = table(7, 12)
    vectors = torch.randn(5, DIM + 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.complex(*layout.split(vectors)) * torch.complex(cos[0], sin[0])
    rotated = layout.rotate(vectors, cos[0], sin[0])
    torch.testing.assert_close(torch.complex(*layout.split(rotated)), expected, rtol=0, atol=1e-12)
    assert torch.equal(layout.join(*layout.split(vectors)), vectors[:, layout.start : layout.end])
    first, second = layout.split(torch.arange(DIM + 8))
    assert (second - first == layout.gap).all()
    assert (first.diff() == layout.stride).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1.0, 1.3])
@pytest.mark.parametrize("chunk", [SLOTS, 128, 7, 1])
def test_the_rotation_continues_as_the_model_would(
    dtype: torch.dtype, tolerance: float, size: float, chunk: int
) -> None:
    cos, sin = (part.to(dtype) for part in table(0, SLOTS, size))
    got = rotary(cos, sin, chunk).after(torch.tensor([SLOTS]), 512)
    for mine, theirs in zip(got, table(SLOTS, SLOTS + 512, size), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=size * tolerance)


def test_a_padded_row_continues_from_its_own_length() -> None:
    cos, sin = table(0, SLOTS)
    short = 77
    padded = [torch.cat([part[:, :1].expand(1, SLOTS - short, -1), part[:, :short]], 1) for part in (cos, sin)]
    both = rotary(*(torch.cat(parts) for parts in zip(padded, (cos, sin), strict=True)))
    got = both.after(torch.tensor([short, SLOTS]), 9)
    alone = rotary(cos[:, :short], sin[:, :short]).after(torch.tensor([short]), 9)
    for mine, theirs in zip(got, alone, strict=True):
        assert torch.equal(mine[:1], theirs)
    torch.testing.assert_close(got[0][1], table(SLOTS, SLOTS + 9)[0][0], rtol=0, atol=1e-9)


def test_one_token_shows_no_angle() -> None:
    cos, sin = table(5, 6)
    ahead, _ = rotary(cos, sin).after(torch.tensor([1]), 3)
    torch.testing.assert_close(ahead, cos.expand(1, 3, -1))
