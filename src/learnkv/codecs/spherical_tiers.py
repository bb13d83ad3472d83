"""Tiers of Spherical KV: which entries are stored in more bits than others, and which not at all."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DROP, HIGH, MID, LOW = range(4)
BITS = {DROP: 0, HIGH: 116, MID: 100, LOW: 48}
"""Bits of a key of 128 channels as the published code counts them."""
_NEXT = {HIGH: MID, MID: LOW, LOW: DROP}
_DISTORTION = {HIGH: 0.05, MID: 0.10, LOW: 0.30}
_OF_RADII = 0.01
_OF_A_DROP = 10.0
_OF_A_CHANGE = 0.001
_LEAST_ATTENTION = 0.1


@dataclass(frozen=True)
class SphericalTiers:
    """Greedy tiers under a budget of bits (Spherical KV): the step down that costs least per bit saved comes first.

    An entry's distortion is w * max(attention, 0.1) * sum of its radii / sqrt(D) * (0.01 + 0.05, 0.10 or 0.30 of its
    tier), plus 0.001 if the tier changes; w is 1.2 for recent entries, 3 for retrieved ones. That of a dropped entry is
    10, whatever it weighs: among entries that have to go, the published rule drops the heaviest first. Values are not
    part of its budget.

    Args:
        sinks: first entries, always high; with the recent ones alone above the budget, all others are dropped.
        recent: latest entries, always high.
        retrieved: first and last + 1 of entries with three times the weight.
        bits: of an entry, by tier.
    """

    sinks: int = 4
    recent: int = 256
    retrieved: tuple[int, int] = (0, 0)
    bits: dict[int, int] = field(default_factory=lambda: dict(BITS))

    def allocate(self, radii: Tensor, attention: Tensor, budget: float, head_dim: int = 128) -> Tensor:
        """Tiers [L, H, T] int64, of all entries high at first.

        Args:
            radii: [L, H, T, G] of the groups of a key's channels.
            attention: [L, H, T] that an entry gets.
            budget: bits of all entries together.
            head_dim: D.
        """
        tiers = torch.full(attention.shape, HIGH)
        fixed = self._fixed(attention)
        if int(fixed.sum()) * self.bits[HIGH] > budget:
            return tiers.masked_fill(~fixed, DROP)
        return self._lowered(tiers, self._weight(radii, attention, head_dim), budget, one_step=False)

    def tighten(self, tiers: Tensor, radii: Tensor, attention: Tensor, budget: float, head_dim: int = 128) -> Tensor:
        """Tiers [L, H, T] for new attention and a smaller budget: every entry goes down by one tier at most."""
        return self._lowered(tiers.clone(), self._weight(radii, attention, head_dim), budget, one_step=True)

    def _fixed(self, like: Tensor) -> Tensor:
        positions = torch.arange(like.shape[-1])
        return ((positions < self.sinks) | (positions >= like.shape[-1] - self.recent)).expand(like.shape)

    def _weight(self, radii: Tensor, attention: Tensor, head_dim: int) -> Tensor:
        of_position = torch.ones(attention.shape[-1], dtype=torch.float64)
        of_position[slice(*self.retrieved)] = 3
        of_position[max(attention.shape[-1] - self.recent, 0) :] = 1.2
        length = radii.double().sum(-1) / math.sqrt(head_dim)
        return of_position * attention.double().clamp(min=_LEAST_ATTENTION) * length

    def _lowered(self, tiers: Tensor, weight: Tensor, budget: float, one_step: bool) -> Tensor:
        before, weights, fixed = (part.flatten().tolist() for part in (tiers, weight, self._fixed(tiers)))
        now, spent = list(before), sum(self.bits[tier] for tier in before)
        heap = [
            self._step(entry, before, now, weights)
            for entry, stays in enumerate(fixed)
            if not stays and now[entry] != DROP
        ]
        heapq.heapify(heap)
        while spent > budget and heap:
            _, entry = heapq.heappop(heap)
            tier = _NEXT[now[entry]]
            spent -= self.bits[now[entry]] - self.bits[tier]
            now[entry] = tier
            if tier != DROP and not one_step:
                heapq.heappush(heap, self._step(entry, before, now, weights))
        return torch.tensor(now, dtype=torch.int64).view(tiers.shape)

    def _step(
        self, entry: int, before: Sequence[int], now: Sequence[int], weights: Sequence[float]
    ) -> tuple[float, int]:
        """Distortion per bit saved of an entry's next step down, and the entry."""
        tier = now[entry]
        old, new = (_distortion(level, before[entry], weights[entry]) for level in (tier, _NEXT[tier]))
        return (new - old) / (self.bits[tier] - self.bits[_NEXT[tier]]), entry


def _distortion(tier: int, before: int, weight: float) -> float:
    of_tier = _OF_A_DROP if tier == DROP else weight * (_OF_RADII + _DISTORTION[tier])
    return of_tier + (_OF_A_CHANGE if tier != before else 0)
