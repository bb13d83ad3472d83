"""Continuations of prompts with kept and evicted entries, as arguments of the ops of training."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from support.kernels import DEVICE, capped_with_sinks, draw

SPARE = 5  # NaN entries around and between the segments


@dataclasses.dataclass
class Case:
    """One call; `lengths` are kept entries of the prompts' heads, B * heads of them, out of `slots` each."""

    lengths: list[int]
    slots: int = 70
    heads: int = 2
    group: int = 2
    copies: int = 1
    dim: int = 32
    new: int = 3
    tail: int = 5
    dtype: torch.dtype = torch.float32
    masked: bool = False
    capped: bool = False
    """With a soft cap and sinks."""

    @property
    def batch(self) -> int:
        return len(self.lengths) // self.heads

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Arguments of `relaxed_attention`; `gates` are 1 for kept entries and 0 for the rest."""
        dtype, batch, rows = dtype or self.dtype, self.batch, self.batch * self.copies
        # Keys grow longer, so that the largest score keeps moving; some evicted ones would dominate.
        size = torch.linspace(0.5, 1.5, self.slots, device=DEVICE).to(dtype).unsqueeze(-1)
        keys, values = (draw(batch, self.heads, self.slots, self.dim, seed=seed, dtype=dtype) for seed in (1, 2))
        keys = keys * size
        order = draw(batch * self.heads, self.slots, seed=3).argsort(-1)
        length = torch.tensor(self.lengths)
        offset = length.cumsum(0) - length + SPARE * torch.arange(1, len(self.lengths) + 1)
        pools = torch.full((2, int(length.sum()) + SPARE * (len(self.lengths) + 1), self.dim), torch.nan, device=DEVICE)
        pools = pools.to(dtype)
        gates = torch.zeros(
            batch * self.heads, self.slots, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32)
        )
        for row, (begin, count) in enumerate(zip(offset.tolist(), self.lengths, strict=True)):
            kept = order[row, :count].sort().values
            gates[row, kept] = 1
            if count < self.slots:
                keys.view(-1, self.slots, self.dim)[row, order[row, -1]] *= 6
            for pool, whole in zip(pools, (keys, values), strict=True):
                pool[begin : begin + count] = whole.view(-1, self.slots, self.dim)[row, kept]
        mask = None
        if self.masked:
            mask = torch.ones(rows, 1, self.new, self.tail, dtype=torch.bool).tril(self.tail - self.new)
            mask &= draw(rows, 1, 1, self.tail, seed=4).cpu() > -0.7
            mask[0, 0, 0] = False  # this query attends to its segment alone, and to nothing where that is empty
            mask = mask.to(DEVICE)
        tables = (
            table.view(batch, 1, self.heads).expand(batch, self.copies, self.heads).flatten().to(DEVICE)
            for table in (offset, length)
        )
        tails = (draw(rows, self.heads, self.tail, self.dim, seed=seed, dtype=dtype) for seed in (5, 6))
        # A transposed view, as models make them.
        query = draw(rows, self.new, self.heads * self.group, self.dim, seed=7, dtype=dtype).transpose(1, 2)
        names = ("offset", "length", "tail_keys", "tail_values")
        return {
            "query": query,
            "keys": keys,
            "values": values,
            "gates": gates.view(batch, self.heads, self.slots),
            "kept_keys": pools[0],
            "kept_values": pools[1],
            "longest": max(self.lengths),
            "tail_mask": mask,
            "scaling": 1.5 * self.dim**-0.5,
            **({"terms": capped_with_sinks(self.heads * self.group)} if self.capped else {}),
            **dict(zip(names, (*tables, *tails), strict=True)),
        }

    def direction(self, dtype: torch.dtype | None = None) -> Tensor:
        """Gradient of the output; transposed, as it arrives from the model."""
        shape = (self.batch * self.copies, self.new, self.heads * self.group, self.dim)
        return draw(*shape, seed=8, dtype=dtype or self.dtype).transpose(1, 2)


SEGMENT = ("kept_keys", "kept_values", "offset", "length", "longest")


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
