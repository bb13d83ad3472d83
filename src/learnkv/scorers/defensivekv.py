"""DefensiveKV scores."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.output_projection import projected_l1
from learnkv.ops.pool_apart import pool_apart


@dataclass(frozen=True)
class Parts:
    """The steps of DefensiveKV, for entries before the window."""

    average: Tensor
    """[B, H, S] mean attention of the window's queries and the query heads of a kv head."""
    defensive: Tensor
    """[B, H, S] the largest attention, pooled, and no less than its mean over the head's entries."""
    factor: Tensor
    """[B, H, S] size of the value in the output, as a share of that of all heads at the position."""
    bias: Tensor
    """[B] attention to as many entries just before the window as the window has."""
    count: Tensor
    """[B, H] entries of each head that are promoted for their average attention."""
    promoted: Tensor
    """[B, H, S] which these are."""
    scores: Tensor
    """[B, H, S] the result."""


class DefensiveKV(Scorer):
    """The largest attention that any of the last queries gave, not the mean (DefensiveKV, arXiv 2510.13334).

    score_j = max(m_j, mean_t m_t) * N_j / (sum of N_j over kv heads), with m_j the maximum over the window's queries
    and the query heads of a kv head of the pooled attention, whose sum pooling leaves as it was, and N_j the mean over
    these heads of |W_O v_j|_1. In each head the entries that hold `mass` of the average attention between them, less
    the part that the last entries before the window have, rank above all others, with the layer's best: at most
    as many as its share of the budget less a window. So does the window itself, up to half of the budget.

    In the authors' code the last part and the best score are those of the whole batch, the window is kept whatever the
    budget, and where the budget is smaller than a window nearly all entries are promoted, so that chance decides.

    Args:
        window: number of last prompt queries.
        kernel_size: neighbouring entries that are pooled, odd.
        mass: average attention that a head's promoted entries have together, at most.
        variant: `repaired` as above; `original` as the authors' code.
    """

    status = "numbers"
    reads_budget = True
    functions = frozenset({"projection"})

    def __init__(
        self,
        window: int = 32,
        kernel_size: int = 5,
        mass: float = 0.9,
        variant: Literal["repaired", "original"] = "repaired",
    ) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        if not 0 <= mass <= 1:
            raise UserError(f"mass={mass}: expected 0 to 1")
        self.window = window
        self.kernel_size = kernel_size
        self.mass = mass
        self.variant = variant

    def forward(self, obs: Observation) -> Tensor:
        return self.parts(obs).scores

    def decide(self, obs: Observation, prepared: tuple[Tensor, ...]) -> Tensor:
        return self._parts(obs, prepared).scores

    def parts(self, obs: Observation) -> Parts:
        """The scores and the steps that lead to them."""
        return self._parts(obs, self.prepare(obs))

    def prepare(self, obs: Observation) -> tuple[Tensor, ...]:
        """What `forward` combines.

        Returns:
            Average and defensive attention, factor, place of an entry by its average [B, H, S], bias [B], and [B, H]
            how many entries hold `mass`.
        """
        weights, sees = obs.window_attention(self.window)  # [B, H, G, W, S], [B, H, W, S]
        inside = obs.in_window(self.window)
        past = obs.valid & ~inside
        average = weights.mean(2).sum(2) / sees.sum(2).clamp(min=1)
        defensive = self._defensive(weights, inside, obs.valid)
        sizes = projected_l1(obs.values, obs.projection).mean(2).masked_fill(~obs.valid, 0.0)
        factor = sizes / sizes.sum(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
        bias = self._bias(average, past, inside)
        place = average.masked_fill(~past, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return average, defensive, factor, place, bias, self._first(average, past, bias)

    def _parts(self, obs: Observation, prepared: tuple[Tensor, ...]) -> Parts:
        average, defensive, factor, place, bias, first = prepared
        inside = obs.in_window(self.window)
        past = obs.valid & ~inside
        count = self._count(first, past, obs)
        promoted = (place < count.unsqueeze(-1)) & past
        scores = defensive * factor
        always = inside & (obs.positions >= (obs.length - (obs.kept * obs.length / 2).floor()).view(-1, 1, 1))
        best = scores.masked_fill(~obs.valid, 0.0).amax((1, 2), keepdim=True)
        if self.variant == "original":
            best, always = scores.masked_fill(~past, 0.0).amax().expand_as(best), inside
        scores = torch.where((promoted | always) & obs.valid, best, scores)
        return Parts(average, defensive, factor, bias, count, promoted, scores)

    def _defensive(self, weights: Tensor, inside: Tensor, valid: Tensor) -> Tensor:
        """The largest pooled attention, no less than its mean over the entries before the window, [B, H, S]."""
        within, valid_slots = inside[:, :, None, None], valid[:, :, None, None]
        pooled = pool_apart(weights, within, valid_slots, self.kernel_size, "avg")
        for part in (within, ~within):  # pooling loses mass at both ends
            had, has = (x.masked_fill(~part, 0.0).sum(-1, keepdim=True) for x in (weights, pooled))
            pooled = torch.where(part, pooled * (had / has.clamp(min=torch.finfo(has.dtype).tiny)), pooled)
        worst = pooled.amax((2, 3))
        past = valid & ~inside
        mean = worst.masked_fill(~past, 0.0).sum(-1, keepdim=True) / past.sum(-1, keepdim=True).clamp(min=1)
        return worst.maximum(mean)

    def _bias(self, average: Tensor, past: Tensor, inside: Tensor) -> Tensor:
        """[B] mean over heads of the attention to as many entries before the window as it has itself."""
        length = past.sum(-1, keepdim=True)
        near = past & (past.cumsum(-1) > length - inside.sum(-1, keepdim=True))
        bias = average.masked_fill(~near, 0.0).sum(-1).mean(-1)
        return bias.mean().expand_as(bias) if self.variant == "original" else bias

    def _first(self, average: Tensor, past: Tensor, bias: Tensor) -> Tensor:
        """[B, H] entries before the one with which the best hold `mass` less `bias` of a head."""
        share = average.masked_fill(~past, 0.0).double()
        share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
        mass = share.sort(dim=-1, descending=True).values.cumsum(-1)
        reached = mass >= (self.mass - bias).view(-1, 1, 1)
        return torch.where(reached.any(-1), reached.int().argmax(-1), 0)

    def _count(self, first: Tensor, past: Tensor, obs: Observation) -> Tensor:
        """[B, H] entries to promote: the `first` ones, as far as the budget has room for them."""
        entries = past.sum(-1)
        read = (obs.length - obs.in_window(self.window)[:, 0].sum(-1)).clamp(min=0)  # [B] before the window
        most = (read * obs.kept - self.window).trunc().long().unsqueeze(-1)
        if self.variant == "original":
            return torch.where(most < 0, (entries + most).clamp(min=0), first.minimum(most))
        return first.minimum(most.clamp(min=0))
