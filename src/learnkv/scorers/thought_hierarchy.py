"""Attention of the latest query over all steps, and a part of the entries that is set aside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.observation import Observation, PromptPass, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.attention_columns import attention_columns
from learnkv.ops.reduce_layers import reduce_layers
from learnkv.scorers.carried import Carried
from learnkv.scorers.snapstream import PromptLength


@dataclass(frozen=True)
class LatestAttention(Statistic):
    """Attention of the prompt's last query and of every query after it, mean over the query heads: [B, H, S, 1]."""

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        first = -1 if chunk.aligned else -chunk.queries.shape[2]  # of a prompt the last query counts
        received = attention_columns(
            chunk.queries[:, :, first:],
            chunk.keys,
            query_positions=chunk.query_positions[:, first:],
            positions=chunk.positions,
            valid=chunk.valid,
            scaling=chunk.scaling,
            terms=chunk.terms,
        ).mean(2)
        received = received.unsqueeze(-1)
        if gathered is not None and not chunk.aligned:
            received[:, :, : gathered.shape[2]] += gathered
        return received


@dataclass(frozen=True)
class Offloaded(Carried):
    """1 for entries that have been offloaded."""


class ThoughtHierarchy(Scorer):
    """Mean attention over decode steps; some entries are offloaded, not evicted (arXiv 2605.09490).

    score_j = (1 / steps) * sum over the steps of the mean, over all heads and layers, of softmax(q_last K / sqrt(D))_j,
    where the prompt is one step. All heads and layers keep the same tokens. At each eviction the candidates (generated
    tokens but the first `sinks` and the last `window`) are ranked: the lowest are evicted, `resident` of them stay as
    they are, and those between are offloaded. Offloaded ones are fetched back at every step, so that attention is
    exact, and are no candidates any more.

    The published code evicts a tenth of the candidates every 64 steps, so that its cache grows; here the budget says
    how many, and what is offloaded counts: it is kept, on the device as everything else. The original never evicts the
    prompt either, which a budget below the prompt does not allow: where candidates are too few, the others go by their
    scores, the last `window` at the end. `pin_prompt: false` makes candidates of the prompt's entries, too.

    Args:
        pin_prompt: whether entries of the prompt are no candidates.
        sinks: first generated tokens that are none.
        window: last tokens that are none.
        resident: part of the candidates that is neither evicted nor offloaded.
        least: candidates below which nothing is offloaded.
    """

    status = "numbers"
    statistics = frozenset({LatestAttention(), Offloaded(), PromptLength()})

    def __init__(
        self, pin_prompt: bool = True, sinks: int = 4, window: int = 128, resident: float = 0.5, least: int = 10
    ) -> None:
        super().__init__()
        if min(sinks, window, least) < 0 or not 0 <= resident <= 1:
            raise UserError(
                f"sinks={sinks} window={window} least={least} resident={resident}: expected numbers of tokens >= 0 and "
                "a part between 0 and 1"
            )
        self.pin_prompt, self.sinks, self.last = pin_prompt, sinks, window
        self.resident, self.least = resident, least

    def forward(self, obs: Observation) -> Tensor:
        steps = (obs.length.view(-1, 1, 1) - obs.statistics[PromptLength()].squeeze(-1) + 1).clamp(min=1)
        return obs.statistics[LatestAttention()].squeeze(-1) / steps

    def refine_layers(self, observations: Sequence[Observation], scores: Tensor, budgets: Tensor) -> Tensor:
        """Minus the number of entries of the head that come before, candidates last, the latest tokens first."""
        shared = reduce_layers(observations, scores, "mean", over_heads=True)
        candidates, latest = (
            torch.stack([select(obs).to(scores.device) for obs in observations])
            for select in (self.candidates, self._latest)
        )
        group = (~candidates).int() + latest.int()
        order = shared.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, group.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        return -order.argsort(dim=-1).float()

    def candidates(self, obs: Observation) -> Tensor:
        """[B, H, S] entries that may be evicted or offloaded; of a prompt alone all are equal."""
        length, prompt = obs.length.view(-1, 1, 1), obs.statistics[PromptLength()].squeeze(-1)
        free = obs.positions >= prompt + self.sinks
        if not self.pin_prompt:
            free = free | (obs.positions < prompt)
        free = free & ~self._latest(obs) & (obs.statistics[Offloaded()].squeeze(-1) == 0)
        return obs.valid & free & (length > prompt)

    def _latest(self, obs: Observation) -> Tensor:
        """[B, H, S] the last generated tokens."""
        first = (obs.length.view(-1, 1, 1) - self.last).maximum(obs.statistics[PromptLength()].squeeze(-1))
        return obs.positions >= first

    def carry_layers(
        self, observations: Sequence[Observation], budgets: Tensor
    ) -> Sequence[Mapping[Statistic | PromptPass, Tensor]]:
        device = budgets.device
        present = torch.stack([obs.valid.to(device) for obs in observations])
        scores = torch.stack([self(obs).to(device) for obs in observations]).masked_fill(~present, -torch.inf)
        shared = reduce_layers(observations, scores, "mean", over_heads=True)
        candidates = torch.stack([self.candidates(obs).to(device) for obs in observations])
        count = candidates.sum(-1, keepdim=True)  # [L, B, H, 1]
        evicted = (present.sum(-1) - budgets).clamp(min=0).unsqueeze(-1)
        resident = torch.where(count < self.least, count, (self.resident * count.double()).floor().long())
        order = shared.masked_fill(~candidates, torch.inf).argsort(dim=-1, stable=True)
        place = order.argsort(dim=-1)
        moved = candidates & (place >= evicted) & (place < count - resident)
        flags = [obs.statistics[Offloaded()] for obs in observations]
        return [
            {Offloaded(): before + own.unsqueeze(-1).to(before.device)}
            for before, own in zip(flags, moved, strict=True)
        ]
