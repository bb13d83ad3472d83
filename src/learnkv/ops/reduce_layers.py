"""Scores that the layers of a model, or all its heads, have in common."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor


class Entries(Protocol):
    """Entries of one layer, as an observation has them."""

    @property
    def positions(self) -> Tensor:
        """[B, H, S] prompt position of each entry."""

    @property
    def aligned(self) -> bool:
        """Whether a slot is the same token in every head."""


def token_index(layers: Sequence[Entries], device: torch.device) -> tuple[Tensor, int]:
    """Number of each entry's token in its row [L, B, H, S], and how many numbers there are.

    Slots number the tokens of aligned layers; others, where heads have evicted, are read by position, with a host sync.
    """
    positions = torch.stack([layer.positions.to(device) for layer in layers])
    if all(layer.aligned for layer in layers):
        slots = positions.shape[-1]
        return torch.arange(slots, device=device).expand_as(positions), slots
    return positions.clamp(min=0), int(positions.max()) + 1


def reduce_layers(
    layers: Sequence[Entries], scores: Tensor, reduce: Literal["mean", "max"], over_heads: bool = False
) -> Tensor:
    """Every entry's token's mean or maximum [L, B, H, S] over the layers, and over the heads too, that hold the token.

    Args:
        layers: L.
        scores: [L, B, H, S]; infinite ones take no part.
        over_heads: reduce kv heads as well; else each with its like in the other layers.
    """
    count, batch, heads, slots = scores.shape
    tokens, total = token_index(layers, scores.device)
    rows = batch if over_heads else batch * heads
    order = (1, 2, 0, 3) if not over_heads else (1, 0, 2, 3)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.permute(order).reshape(rows, -1)

    finite, index = flat(scores.isfinite()), flat(tokens)
    members = flat(scores).masked_fill(~finite, 0.0 if reduce == "mean" else -torch.inf)
    if reduce == "mean":
        whole = members.new_zeros(rows, total).scatter_add(1, index, members)
        number = members.new_zeros(rows, total).scatter_add(1, index, finite.to(members.dtype))
        whole = whole / number.clamp(min=1)
    else:
        whole = members.new_full((rows, total), -torch.inf).scatter_reduce(1, index, members, "amax")
    shared = whole.gather(1, index).masked_fill(~finite, 0.0)
    shape = [(count, batch, heads, slots)[axis] for axis in order]
    back = [order.index(axis) for axis in range(4)]
    return shared.view(shape).permute(back)
