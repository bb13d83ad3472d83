"""Conventions of rotary embeddings: how a layer reads what the model computes once for all layers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.core.observation import Embeddings
from learnkv.ops.rotary import Layout


class Convention(NamedTuple):
    """How a layer reads rotary embeddings: the order of their R numbers, and the pairs of channels they rotate."""

    order: str
    """complex, halves (every angle twice, as cat(a, a)), interleaved (a0, a0, a1, a1, …) or single."""
    layout: Layout | None
    """None: the layer does not rotate."""
    direction: int = 1
    """-1: the layer rotates by the negative angles."""

    def pairs(self, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """Cos and sin [B, T, F]."""
        if self.order == "complex":
            cos, sin = embeddings[0].real, embeddings[0].imag
        else:
            half, step = embeddings[0].shape[-1] // 2, 2 if self.order == "interleaved" else 1
            chosen = slice(half) if self.order == "halves" else slice(None, None, step)
            cos, sin = (part[..., chosen] for part in embeddings)
        return cos, sin if self.direction == 1 else -sin

    def embeddings(self, cos: Tensor, sin: Tensor) -> Embeddings:
        """The inverse of `pairs`."""
        sin = sin * self.direction
        if self.order == "complex":
            return (torch.complex(cos.float(), sin.float()),)
        if self.order == "halves":
            return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        if self.order == "interleaved":
            return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        return cos, sin


def candidates(example: Embeddings, dim: int) -> Iterator[Convention]:
    """Conventions that embeddings of this shape and heads of `dim` channels allow, no rotation first."""
    orders = ("complex",) if len(example) == 1 else ("halves", "interleaved", "single")
    for order in orders:
        yield Convention(order, None)
    for order in orders:
        pairs = Convention(order, None).pairs(example)[0].shape[-1]
        if 2 * pairs <= dim:
            for start in sorted({0, dim - 2 * pairs}):
                for layout in (Layout.halves(pairs, start), Layout.interleaved(pairs, start)):
                    yield Convention(order, layout)
                    yield Convention(order, layout, direction=-1)
