"""Rotations undone, and continued beyond the prompt."""

import pytest
import torch

from learnkv.ops.rotary import Rotary, rotate

DIM, SLOTS = 32, 300


def table(start: int, stop: int, size: float = 1.0, base: float = 1e4) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, S, R] as models make them."""
    frequency = base ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    angle = torch.arange(start, stop).unsqueeze(-1) * torch.cat([frequency, frequency])
    return size * angle.cos().unsqueeze(0), size * angle.sin().unsqueeze(0)


def rotary(cos: torch.Tensor, sin: torch.Tensor, chunk: int = SLOTS) -> Rotary:
    return Rotary(tuple(zip(cos.split(chunk, 1), sin.split(chunk, 1), strict=True)))


@pytest.mark.parametrize("chunk", [SLOTS, 290, 20, 7, 1])
@pytest.mark.parametrize("size", [1.0, 1.3])
@pytest.mark.parametrize("channels", [DIM, DIM + 8])
def test_unrotate_undoes_rotate_for_the_last_slots(size: float, channels: int, chunk: int) -> None:
    cos, sin = (part.float() for part in table(0, SLOTS, size))
    before = torch.randn(2, 3, 20, channels, generator=torch.Generator().manual_seed(0))
    after = rotate(before, cos[:, -20:].unsqueeze(1), sin[:, -20:].unsqueeze(1))
    torch.testing.assert_close(rotary(cos, sin, chunk).unrotate(after), before, rtol=1e-5, atol=1e-5)
    if channels > DIM:
        assert torch.equal(after[..., DIM:], before[..., DIM:])


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
