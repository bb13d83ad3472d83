"""Rotary position embedding of a prompt, inverted and extrapolated."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Which channels RoPE rotates against each other: pair i is (start + i * stride, start + i * stride + gap)."""

    pairs: int
    start: int
    stride: int
    gap: int

    @classmethod
    def halves(cls, pairs: int, start: int = 0) -> "Layout":
        """Channel i against channel i + pairs, as in GPT-NeoX and Llama."""
        return cls(pairs, start, 1, pairs)

    @classmethod
    def interleaved(cls, pairs: int, start: int = 0) -> "Layout":
        """Channel 2i against channel 2i + 1, as in the paper."""
        return cls(pairs, start, 2, 1)

    @property
    def end(self) -> int:
        """The channel after the last rotated one."""
        return self.start + 2 * self.pairs

    def split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """First and second channels [..., F] of all pairs of vectors [..., D]."""
        rotated = vectors[..., self.start : self.end]
        if self.stride == 1:
            first, second = rotated.split(self.pairs, -1)
        else:
            first, second = rotated[..., ::2], rotated[..., 1::2]
        return first, second

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """The rotated channels [..., 2F] in their order."""
        return torch.cat([first, second], -1) if self.stride == 1 else torch.stack([first, second], -1).flatten(-2)

    def rest(self, vectors: Tensor) -> Tensor:
        """The channels of vectors [..., D] that are not rotated."""
        before, after = vectors[..., : self.start], vectors[..., self.end :]
        return torch.cat([before, after], -1) if before.shape[-1] else after

    def rotate(self, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Vectors [..., D] rotated by the angles of `cos` and `sin` [..., F]."""
        first, second = self.split(vectors)
        rotated = self.join(first * cos - second * sin, second * cos + first * sin)
        return torch.cat([vectors[..., : self.start], rotated, vectors[..., self.end :]], -1)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding as a layer applies it (arXiv 2104.09864); channels outside `layout` are left alone."""

    parts: tuple[tuple[Tensor, Tensor], ...]
    """cos and sin [B, S, F] of every chunk of the prompt, or [1, S, F] where all rows have the same positions. Layers
    share them, so they are not concatenated."""
    layout: Layout
    """The pairs of channels, of which there are F."""

    def unrotate(self, vectors: Tensor) -> Tensor:
        """Queries or keys [B, N, T, D] of the last T slots as they were before they were rotated, float32."""
        cos, sin = (part.unsqueeze(1).float() for part in self._last(vectors.shape[2]))
        size = cos.square() + sin.square()  # not 1 where the model scales its attention through the embedding
        return self.layout.rotate(vectors.float(), cos / size, -sin / size)

    def after(self, lengths: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, steps, F] in float64 of the positions that follow prompts of `lengths` [B] tokens."""
        last = self._wave(-1)
        ahead = torch.arange(1, steps + 1, device=last.device).view(-1, 1)
        angle = last.angle().unsqueeze(1) + ahead * self._turn(lengths).unsqueeze(1)
        size = last.abs().unsqueeze(1)
        return size * angle.cos(), size * angle.sin()

    def frequencies(self, lengths: Tensor) -> Tensor:
        """Radians per position [F] float32 of every pair, measured on the longest prompt."""
        turn = self._turn(lengths)
        return turn.gather(0, lengths.argmax().expand(1, turn.shape[1]))[0].float()

    def _turn(self, lengths: Tensor) -> Tensor:
        """Radians per position [B, F] in float64.

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
        """Complex numbers cos + i sin [B, F] of a slot, counted from the end."""
        for cos, sin in reversed(self.parts):
            if -slot <= cos.shape[1]:
                return torch.complex(cos[:, slot].double(), sin[:, slot].double())
            slot += cos.shape[1]
        raise IndexError(f"slot {slot} before the first")

    def _last(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, count, F] of the last slots."""
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
