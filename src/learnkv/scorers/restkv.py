"""ReST-KV scores."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.output_projection import isometries
from learnkv.ops.pool_apart import pool_apart
from learnkv.ops.reduce_group import GroupReduce, reduce_group
from learnkv.ops.shifted_mean import shifted_mean

_NARROWEST = 5
_SURE = 1 - 1e-6  # the odds of an entry that has all attention are those of this


class ReSTKV(Scorer):
    """How far the head's output would move if an entry were evicted (ReST-KV, arXiv 2605.08840; details by its code).

    score_j = pool(a_j / (1 - a_j) * |W_O (o - v_j)|_2^power), o = sum_t a_t v_t over the entries before the window, and
    a an exponentially weighted mean of the attention of the window's queries: the distance between o and what is left
    of it without j.
    Neighbours are pooled by how far attention moves within the window: with d the mean distance between the entries of
    one rank for a query of its first half and for that of its second half, over the ranks that will be kept,
    max(5, 2 floor(|d| / scale) + 1) neighbours around the entry d / scale further on.

    The original works per query head, here these are reduced. Its other modes are options.

    Args:
        window: number of last prompt queries.
        kernel_size: neighbouring entries that are pooled otherwise and within the window, odd.
        pooling: as above, or the mean or maximum of `kernel_size` neighbours.
        alpha: weight of a query beside all earlier ones; None: the mean of all.
        each_query: the score of every query is computed before the weighted mean, not its attention, with o over all
            entries that the query sees.
        project: whether vectors are compared after the output projection, or as values.
        relative: whether distances are divided by |W_O o|.
        power: exponent of distances.
        scale: distance in entries by which a window has to move for one neighbour more.
        group_reduce: mean, maximum or sum over the query heads that share a kv head.
    """

    status = "numbers"
    reads_budget = True

    def __init__(
        self,
        window: int = 32,
        kernel_size: int = 5,
        pooling: Literal["adaptive", "avg", "max"] = "adaptive",
        alpha: float | None = 0.3,
        each_query: bool = False,
        project: bool = True,
        relative: bool = False,
        power: float = 1.0,
        scale: int = 2000,
        group_reduce: GroupReduce = "mean",
    ) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0 or scale < 1:
            raise UserError(
                f"window={window} kernel_size={kernel_size} scale={scale}: expected at least 1, kernel_size odd"
            )
        if alpha is not None and not 0 < alpha <= 1:
            raise UserError(f"alpha={alpha}: expected 0 < alpha <= 1, or null")
        self.window, self.kernel_size, self.pooling, self.scale = window, kernel_size, pooling, scale
        self.alpha, self.each_query = alpha, each_query
        self.project, self.relative, self.power = project, relative, power
        self.group_reduce = group_reduce
        if project:
            self.functions = frozenset({"projection"})

    def forward(self, obs: Observation) -> Tensor:
        return self.decide(obs, self.prepare(obs))

    def prepare(self, obs: Observation) -> tuple[Tensor, ...]:
        """Scores of query heads before and after pooling, and how far attention moves up to each rank: [B, H, G, S]."""
        weights, sees = obs.window_attention(self.window)  # [B, H, G, W, S], [B, H, W, S]
        inside = obs.in_window(self.window)
        past = obs.valid & ~inside
        values = obs.values.to(weights.dtype).masked_fill(~obs.valid.unsqueeze(-1), 0.0)
        heads, group = weights.shape[1:3]
        small = None
        if self.project:
            small = isometries(obs.projection, heads * group).to(weights.dtype).unflatten(0, (heads, group))
        parts = []
        for member in range(group):  # values after projection are as large as the keys for each
            projected = values if small is None else torch.einsum("hmd,bhsd->bhsm", small[:, member], values)
            parts.append(self._moved(weights[:, :, member], sees, past, projected))
        figures = torch.stack(parts, 2)  # [B, H, G, S]
        within, valid = inside.unsqueeze(2), obs.valid.unsqueeze(2)
        pooled = pool_apart(figures, within, valid, self.kernel_size, "max" if self.pooling == "max" else "avg")
        return figures, pooled, self._moved_by_rank(weights, obs) if self.pooling == "adaptive" else pooled

    def decide(self, obs: Observation, prepared: tuple[Tensor, ...]) -> Tensor:
        figures, pooled, moved = prepared
        if self.pooling == "adaptive":
            inside = obs.in_window(self.window).unsqueeze(2)
            width, shift = self._movement(moved, obs)
            pooled = torch.where(inside, pooled, shifted_mean(figures, obs.valid.unsqueeze(2) & ~inside, width, shift))
        return reduce_group(pooled, self.group_reduce)

    def _moved(self, weights: Tensor, sees: Tensor, past: Tensor, values: Tensor) -> Tensor:
        """Scores before pooling [B, H, S] from weights [B, H, W, S] of one query head per kv head."""
        if self.each_query:
            output = weights @ values  # [B, H, W, D]
            apart = torch.cdist(output, values, compute_mode="donot_use_mm_for_euclid_dist")
            return self._over_queries(self._score(weights, apart, output), sees)
        attention = self._over_queries(weights, sees)  # [B, H, S]
        output = attention.masked_fill(~past, 0.0).unsqueeze(2) @ values  # [B, H, 1, D]
        return self._score(attention, (output - values).norm(dim=-1), output.squeeze(2))

    def _score(self, attention: Tensor, apart: Tensor, output: Tensor) -> Tensor:
        if self.relative:
            apart = apart / output.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        attention = attention.clamp(max=_SURE)
        return attention / (1 - attention) * apart**self.power

    def _over_queries(self, figures: Tensor, sees: Tensor) -> Tensor:
        """Weighted mean [B, H, S] of figures [B, H, W, S] over the queries that see an entry, the latest ones most."""
        queries = sees.sum(2, keepdim=True)
        if self.alpha is None:
            return figures.masked_fill(~sees, 0.0).sum(2) / queries.squeeze(2).clamp(min=1)
        later = sees.flip(2).cumsum(2).flip(2) - 1
        first = torch.where(later == queries - 1, torch.ones((), dtype=torch.float32, device=later.device), self.alpha)
        share = first * (1 - self.alpha) ** later.float()
        return (figures.masked_fill(~sees, 0.0) * share).sum(2)

    def _moved_by_rank(self, weights: Tensor, obs: Observation) -> Tensor:
        """Distances [B, H, G, S] that entries up to a rank move from the window's first half to its second, in all."""
        count, slots = weights.shape[3:]
        pairs = torch.arange(count // 2, device=weights.device)
        half = self._half(obs)
        order = weights.masked_fill(~obs.valid[:, :, None, None], -1.0).argsort(dim=-1, descending=True, stable=True)

        def places(begin: Tensor) -> Tensor:
            """Slots by rank [B, H, G, P, S] for the queries `begin` [B, 1] and after."""
            query = (begin + pairs).clamp(min=0, max=count - 1)
            return order.gather(3, query[:, None, None, :, None].expand(*order.shape[:3], -1, slots))

        apart = places(count - 2 * half) - places(count - half)  # padding comes first
        return (apart * (pairs < half)[:, None, None, :, None]).sum(3).cumsum(-1)

    def _half(self, obs: Observation) -> Tensor:
        """[B, 1] half the number of queries in the window."""
        return (obs.query_positions[:, -self.window :] >= 0).sum(-1, keepdim=True) // 2

    def _movement(self, moved: Tensor, obs: Observation) -> tuple[Tensor, Tensor]:
        """Number of neighbours and shift [B, H, G] that follow how far attention moves within the window."""
        ranks = (obs.kept * obs.length).round().long() - self.window
        ranks = ranks.clamp(min=1, max=moved.shape[-1])
        last = (ranks - 1).view(-1, 1, 1, 1).expand(*moved.shape[:3], 1)
        number = (ranks.unsqueeze(-1) * self._half(obs)).clamp(min=1).view(-1, 1, 1)
        distance = moved.gather(3, last).squeeze(3).double() / number / self.scale
        width = (2 * distance.abs().floor() + 1).clamp(min=_NARROWEST)
        return width, torch.where(distance < 0, distance.floor() + 1, distance.floor())
