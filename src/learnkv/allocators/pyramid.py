"""Budgets that shrink from the first layer to the last."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator
from learnkv.errors import UserError


class Pyramid(Allocator):
    """An arithmetic progression over the layers, wide at the bottom (PyramidKV, arXiv 2406.02069).

    Of the budget, `protected` entries of every head stand outside the progression. Of the rest, b per head on average,
    the last layer gets b/beta and the first 2b - b/beta; where the prompt has fewer entries, the first layer gets them
    all and the last layer what that leaves. Layers may request more than the prompt has; rounding clips and
    spends the rest.

    Args:
        beta: the last layer's share is 1/beta of the average; 1 is a flat pyramid.
        protected: sinks and recent entries of the policy, at most half of the budget.
        rounding: `exact` spends the budget; the others are tables in print, with the observation window as `protected`,
            that over- or underspend: `original` (KVCache-Factory: whole steps; flat for short prompts), `adakv` (whole
            steps, never flat), `kvpress` (each layer rounded; flat where the progression does not fit the prompt).
    """

    status = "numbers"
    static = True

    def __init__(
        self, beta: int = 20, protected: int = 12, rounding: Literal["exact", "original", "adakv", "kvpress"] = "exact"
    ) -> None:
        super().__init__()
        if beta < 1:
            raise UserError(f"beta={beta}: expected 1 or more")
        if protected < 0:
            raise UserError(f"protected={protected}: expected 0 or more")
        self.beta = beta
        self.protected = protected
        self.rounding = rounding

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, _ = scores.shape
        entries = (scores[0, :, 0] > -torch.inf).sum(-1).to(torch.float64)  # [B], the same in every head
        wanted = self._table(layers, budget.to(torch.float64), entries)
        return wanted.unsqueeze(-1).expand(layers, batch, heads)

    def _table(self, layers: int, budget: Tensor, entries: Tensor) -> Tensor:
        """Entries per head [L, B] for `budget` [B] out of `entries` [B]; float64 holds the integer tables exactly."""
        whole = self.rounding in ("original", "adakv")
        protected = torch.full_like(budget, self.protected)
        if self.rounding == "exact":
            protected = protected.minimum(budget / 2)
        elif self.rounding == "kvpress":
            budget = budget + protected  # its budget buys the progression alone, which the window then eats into
        rest = budget - protected
        last = (rest / self.beta).floor() if whole else rest / self.beta
        first = 2 * rest - last
        too_many = first > entries - protected
        first = torch.where(too_many, entries - protected, first) if layers > 1 else rest
        last = torch.where(too_many, 2 * rest - first, last)
        step = (first - last) / max(layers - 1, 1)
        if whole:
            step = step.floor()
        wanted = first - torch.arange(layers, dtype=budget.dtype, device=budget.device).unsqueeze(-1) * step
        if self.rounding == "kvpress":
            steep = (entries >= first) & (first >= last) & (last >= protected)
            return torch.where(steep, wanted, rest).round()
        if self.rounding == "original":
            wanted = torch.where(entries < 2 * rest, rest, wanted)
        return (wanted + protected).clamp(min=0)
