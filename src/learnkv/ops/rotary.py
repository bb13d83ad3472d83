"""Rotary position embedding of a prompt, inverted and extrapolated."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding as the model applied it (arXiv 2104.09864): halves rotated against each other.

    R may be smaller than the head dimension: the channels after the first R are left alone.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    """cos and sin [B, S, R] of every chunk of the prompt, or [1, S, R] where all rows have the same positions. Layers
    share them, so they are not concatenated."""

    def unrotate(self, vectors: Tensor) -> Tensor:
        """Queries or keys [B, N, T, D] of the last T slots as they were before they were rotated, float32."""
        cos, sin = (part.unsqueeze(1).float() for part in self._last(vectors.shape[2]))
        size = cos.square() + sin.square()  # not 1 where the model scales its attention through the embedding
        return rotate(vectors.float(), cos / size, -sin / size)

    def after(self, lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, steps, R] in float64 of the positions that follow prompts of `lengths` [B] tokens."""
        last = self._wave(-1)
        ahead = torch.arange(1, steps + 1, device=last.device).view(-1, 1)
        angle = last.angle().unsqueeze(1) + ahead * self._turn(lengths).unsqueeze(1)
        size = last.abs().unsqueeze(1)
        return size * angle.cos(), size * angle.sin()

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Radians per position [R/2] float32 of channel i against channel i + R/2, measured on the longest prompt."""
        turn = self._turn(lengths)
        longest = turn.gather(0, lengths.argmax().expand(1, turn.shape[1]))
        return longest[0, : turn.shape[1] // 2].float()

    def _turn(self, lengths: Tensor) -> Tensor:
        """Radians per position [B, R] in float64.

        It is measured from cos and sin: over one slot, then over twice as many each time, which gives its last digits
        even from bfloat16. For a prompt of one token it is 0.
        """
        last = self._wave(-1)
        turn = torch.zeros(len(lengths), last.shape[-1], dtype=torch.float64, device=last.device)
        apart, slots = 1, sum(cos.shape[1] for cos, _ in self.parts)
        while apart < slots:
            angle = (last * self._wave(-1 - apart).conj()).angle()
            angle = angle + 2 * math.pi * ((apart * turn - angle) / (2 * math.pi)).round()
            turn = torch.where((lengths > apart).unsqueeze(-1), angle / apart, turn)
            apart *= 2
        return turn

    def _wave(self, slot: int) -> Tensor:
        """Complex numbers cos + i sin [B, R] of a slot, counted from the end."""
        for cos, sin in reversed(self.parts):
            if -slot <= cos.shape[1]:
                return torch.complex(cos[:, slot].double(), sin[:, slot].double())
            slot += cos.shape[1]
        raise IndexError(f"slot {slot} before the first")

    def _last(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, count, R] of the last slots."""
        parts: list[tuple[Tensor, Tensor]] = []
        for cos, sin in reversed(self.parts):
            begin = max(0, cos.shape[1] - count)
            parts.insert(0, (cos[:, begin:], sin[:, begin:]))
            count -= cos.shape[1] - begin
            if not count:
                break
        if len(parts) == 1:
            return parts[0]
        cosines, sines = zip(*parts, strict=True)
        return torch.cat(cosines, 1), torch.cat(sines, 1)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Vectors [..., D] rotated by the angles of `cos` and `sin` [..., R], in their first R channels."""
    turned, rest = vectors[..., : cos.shape[-1]], vectors[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
