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

_LEAST = 1e-12


@dataclass(frozen=True)
class Credit(Statistic):
    """Running mean of an entry's attention mass over evictions, [B, H, S, 1]; 0 for entries that are new."""

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        batch, heads, slots = chunk.valid.shape
        before = 0 if gathered is None else gathered.shape[2]
        new = chunk.keys.new_zeros(batch, heads, slots - before, 1, dtype=torch.float32)
        return new if gathered is None else torch.cat([gathered, new], 2)


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
        chosen = torch.zeros(scores.shape, dtype=torch.float32)
        mass, own, always, valid, counts = (
            part.cpu() for part in (mass, own.float(), scores == torch.inf, obs.valid, budgets)
        )
        for row, head in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape[:2])).tolist():
            slots = valid[row, head].nonzero()[:, 0]
            parts = mass[row, head, slots], own[row, head, slots], always[row, head, slots]
            chosen[row, head, slots] = self._chosen(*parts, total=int(counts[row, head])).float()
        return chosen.to(scores.device)

    def carry(self, obs: Observation, budgets: Tensor) -> Mapping[Statistic | PromptPass, Tensor]:
        if not self.credit:
            return {}
        evicts = (budgets < obs.valid.sum(-1)).view(*budgets.shape, 1, 1)
        credit = self._mass(obs, budgets)[1].unsqueeze(-1)
        return {Credit(): torch.where(evicts, credit, obs.statistics[Credit()])}

    def portions(self, mass: Tensor, total: int) -> list[tuple[int, int, int]]:
        """Begin, end and kept entries of each segment of entries with shares `mass` [T], `total` kept in all."""
        bounds = mass_segments(mass, self.step, self.shortest, self.longest)
        masses = [float(mass[begin:end].sum()) for begin, end in bounds]
        kept = segment_budgets([end - begin for begin, end in bounds], masses, total, self.least)
        return [(*bound, count) for bound, count in zip(bounds, kept, strict=True)]

    def _chosen(self, mass: Tensor, scores: Tensor, always: Tensor, total: int) -> Tensor:
        """Which entries [T] of one head are kept, `always` among them."""
        if total >= len(mass):
            return torch.ones_like(always)
        picked = torch.zeros_like(always)
        for begin, end, count in self.portions(mass, total):
            picked[begin + scores[begin:end].topk(count).indices] = True
        # Ranked in three classes: protected, picked, others.
        place = scores.argsort(descending=True, stable=True)
        rank = torch.empty_like(place).scatter_(0, place, torch.arange(len(place)))
        order = rank + len(place) * torch.where(always, 0, torch.where(picked, 1, 2))
        return torch.zeros_like(always).scatter_(0, order.argsort()[:total], True)

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
