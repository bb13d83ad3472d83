"""Adaptive mass segments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from learnkv.core.observation import Observation, PromptPass, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.mass_segments import mass_segments, segment_budgets
from learnkv.scorers.carried import Carried

_LEAST = 1e-12


@dataclass(frozen=True)
class Credit(Carried):
    """Running mean of an entry's attention mass over evictions."""


class AMS(Scorer):
    """Another method's best entries of every segment of about the same attention mass (AMS, arXiv 2605.23200).

    The mass of an entry is the mean attention of the last W queries, pooled, averaged over the query heads of a kv
    head, with the largest value of all for the last W entries, as a share of its head: m. A credit
    c <- decay * c + (1 - decay) * m is kept with every entry from one eviction to the next, and
    u = (1 - credit) * m + credit * c / sum(c) is cut wherever it has summed up to a multiple of `step`
    (`mass_segments`). A segment keeps `least` entries and a part of the rest by its mass (`segment_budgets`): the best
    by `base`. Protected entries come first, then those, and where these are too few the best of all.

    The published code evicts every 512 tokens, of which it protects the last 32, and never the prompt; its class has
    segments of 64 to 2,048 entries, its runs those of the defaults here. With more segments than entries to keep it
    never ends; here the segments of the most mass keep one entry each. Masses are averaged over the batch there, so
    that rows depend on each other.

    Args:
        base: scores within a segment; not given: the attention itself, before shares are taken.
        window: number of last queries.
        kernel_size: neighbouring entries whose attention is averaged, odd.
        step: mass of a segment.
        shortest: entries below which a segment takes in the next one.
        longest: entries above which a segment is split, before short ones take in others.
        least: entries that every segment keeps where there is room.
        credit: weight of the credit in the mass; 0: none is kept.
        decay: how much of the credit stays.
        batch: whether the mass of a segment is that of each of the `rows`, or `joint`, as in the original.
    """

    status = "numbers"

    def __init__(
        self,
        base: Scorer | None = None,
        window: int = 32,
        kernel_size: int = 5,
        step: float = 0.02,
        shortest: int = 32,
        longest: int = 1024,
        least: int = 8,
        credit: float = 0.3,
        decay: float = 0.8,
        batch: Literal["rows", "joint"] = "rows",
    ) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        if not 0 < step <= 1 or not 1 <= shortest <= longest or least < 0:
            raise UserError(
                f"step={step} shortest={shortest} longest={longest} least={least}: "
                "expected 0 < step <= 1, 1 <= shortest <= longest, least >= 0"
            )
        if not (0 <= credit <= 1 and 0 <= decay < 1):
            raise UserError(f"credit={credit} decay={decay}: expected 0 <= credit <= 1 and 0 <= decay < 1")
        if base is not None:
            self._builds_on(base)
        self.base = base
        self.last, self.kernel_size = window, kernel_size
        self.step, self.shortest, self.longest, self.least = step, shortest, longest, least
        self.credit, self.decay, self.batch = credit, decay, batch
        self.window = max(self.window, window + 1)  # the original leaves out the first query that it has
        if credit:
            self.statistics = frozenset({Credit()})

    def forward(self, obs: Observation) -> Tensor:
        if self.base is not None:
            return self.base(obs)
        pooled, newest = self._pooled(obs, obs.valid.sum(-1))
        return torch.where(newest, pooled.amax(-1, keepdim=True), pooled)  # of the head, so that none are tied

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """1 for entries that are kept, 0 for others."""
        mass = self._mass(obs, budgets)[0]
        if self.batch == "joint":
            if len(obs.valid.unique(dim=0)) > 1:
                raise UserError("batch=joint: expected rows of the same entries")
            mass = mass.mean(0, keepdim=True).expand_as(mass)
            mass = mass / mass.sum(-1, keepdim=True)
        own = self._attention(obs, budgets) if self.base is None else self.base(obs)
        order = obs.valid.int().argsort(dim=-1, descending=True, stable=True)  # entries first, as they were
        mass, own, always = (part.gather(-1, order) for part in (mass, own.float(), scores == torch.inf))
        chosen = self._chosen(mass, own, always, entries=obs.valid.sum(-1), total=budgets.long())
        return torch.zeros_like(mass, dtype=torch.float32).scatter_(-1, order, chosen.float())

    def carry(self, obs: Observation, budgets: Tensor) -> Mapping[Statistic | PromptPass, Tensor]:
        if not self.credit:
            return {}
        evicts = (budgets < obs.valid.sum(-1)).view(*budgets.shape, 1, 1)
        credit = self._mass(obs, budgets)[1].unsqueeze(-1)
        return {Credit(): torch.where(evicts, credit, obs.statistics[Credit()])}

    def portions(self, mass: Tensor, entries: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds [..., K + 1] of segments of the first `entries` [...], with shares `mass` [..., T], and what is kept.

        Of each segment that many entries [..., K], `total` [...] in all.
        """
        bounds = mass_segments(mass, entries, self.step, self.shortest, self.longest)
        masses = F.pad(mass.double().cumsum(-1), (1, 0)).gather(-1, bounds).diff(dim=-1)
        return bounds, segment_budgets(bounds.diff(dim=-1), masses, total, self.least)

    def _chosen(self, mass: Tensor, scores: Tensor, always: Tensor, entries: Tensor, total: Tensor) -> Tensor:
        """Which of the first `entries` [B, H] are kept [B, H, T], `total` [B, H] of them, the earlier of equal ones."""
        total = total.minimum(entries)
        bounds, counts = self.portions(mass, entries, total)
        number = torch.arange(mass.shape[-1], device=mass.device).expand(mass.shape).contiguous()
        present = number < entries.unsqueeze(-1)
        segment = torch.searchsorted(bounds[..., 1:].contiguous(), number, right=True)
        place = scores.masked_fill(~present, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        # Entries by segment, in each the best first; a segment's begin where its entries lie.
        place_in = place.gather(-1, segment.gather(-1, place).argsort(dim=-1, stable=True))
        own = segment.clamp(max=counts.shape[-1] - 1)
        best = present & (number - bounds.gather(-1, own) < counts.gather(-1, own))
        picked = torch.zeros_like(best).scatter_(-1, place_in, best)
        # Ranked in classes: protected, picked, others, and what is no entry.
        rank = torch.empty_like(place).scatter_(-1, place, number)
        kind = torch.where(always, 0, torch.where(picked, 1, torch.where(present, 2, 3)))
        order = (rank + mass.shape[-1] * kind).argsort(dim=-1)
        return torch.zeros_like(best).scatter_(-1, order, number < total.unsqueeze(-1))

    def _mass(self, obs: Observation, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of a head's mass and the new credit, [B, H, S] each."""
        attention = self._attention(obs, budgets).clamp(min=0) + _LEAST
        mass = attention.masked_fill(~obs.valid, 0.0)
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=_LEAST)
        if not self.credit:
            return mass, mass
        before = obs.statistics[Credit()].squeeze(-1)
        credit = (self.decay * before + (1 - self.decay) * mass).masked_fill(~obs.valid, 0.0)
        used = (1 - self.credit) * mass + self.credit * credit / credit.sum(-1, keepdim=True).clamp(min=_LEAST)
        return used / used.sum(-1, keepdim=True).clamp(min=_LEAST), credit

    def _attention(self, obs: Observation, budgets: Tensor) -> Tensor:
        """Pooled mean attention [B, H, S] of the last W queries, the largest of the row for the last W entries."""
        pooled, newest = self._pooled(obs, budgets)
        most = pooled.amax() if self.batch == "joint" else pooled.amax((1, 2), keepdim=True)
        return torch.where(newest, most, pooled)

    def _pooled(self, obs: Observation, budgets: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled mean attention of the last W queries, 0 for the last W entries, and which these are; [B, H, S]."""
        weights, _ = obs.window_attention(self.last + 1)  # [B, H, G, Q, S]
        queries = (obs.query_positions[:, -self.last - 1 :] >= 0).sum(-1)  # [B]
        entries = obs.valid.sum(-1)  # [B, H]
        rows = (queries - 1).clamp(1, self.last).unsqueeze(-1).minimum(entries - 1).minimum(budgets).clamp(min=0)
        number, count = torch.arange(weights.shape[3], device=weights.device), weights.shape[3]
        among = number >= (count - rows).unsqueeze(-1)  # [B, H, Q]
        mean = (weights.mean(2) * among.unsqueeze(-1)).sum(2) / rows.clamp(min=1).unsqueeze(-1)
        place = obs.valid.cumsum(-1) - 1
        newest = obs.valid & (place >= (entries - rows).unsqueeze(-1))
        past = obs.valid & ~newest
        pooled = F.avg_pool1d(mean.masked_fill(~past, 0.0), self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.float().masked_fill(~past, 0.0), newest
