"""TriAttention scores."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.ops.rotary import Layout

QUERIES = {"mean": "LND", "magnitude": "LNF"}
"""Mean query of N query heads before rotation, and mean magnitudes of its F rotated pairs of channels."""


@dataclass(frozen=True)
class QueryFrequencies(Statistic):
    """Mean of all queries before RoPE and mean magnitude of each of their F rotated pairs: [B, H, G, D + F]."""

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        rope = chunk.rope
        queries = chunk.queries.float() if rope is None else rope.unrotate(chunk.queries)
        magnitude = torch.hypot(*_layout(chunk).split(queries))
        valid = (chunk.query_positions >= 0)[:, None, :, None]  # [B, 1, T, 1]
        sums: Tensor = torch.cat([queries, magnitude], -1).masked_fill(~valid, 0.0).sum(2)
        sums = sums.unflatten(1, (chunk.keys.shape[1], -1))
        mean = torch.zeros_like(sums) if gathered is None else gathered
        count, length = valid.sum((1, 2, 3)).view(-1, 1, 1, 1), chunk.length.view(-1, 1, 1, 1).clamp(min=1)
        return mean + (sums - count * mean) / length


class TriAttention(Scorer):
    """Attention expected from future queries by their mean at each RoPE frequency (TriAttention, arXiv 2604.04921).

    With q_f and k_f the complex pairs of channels before RoPE, mu_f = mean q_f and m_f = mean |q_f|, a key at position
    p has, for a query d positions after the next one t,
    z(d) = s^2 sum_f (|mu_f| |k_f| cos((t - p + d) w_f + arg(mu_f conj k_f)) + (m_f - |mu_f|) |k_f|), s RoPE's scale of
    the attention; channels without rotation add mean(q) k. z is averaged over d = 1, 2, 4, …, `furthest`, standardised
    over the entries of a query head, and the query heads of a kv head are reduced.

    The published code measures mu and m once per model and evicts while tokens are generated, by default one set of
    positions per kv head for all layers. Here they are those of the prompt's own queries unless `queries` names a file,
    every layer has its own sets, and the prompt is compressed.

    Args:
        furthest: largest distance of a future query, in positions.
        aggregation: mean or maximum over the distances.
        group_reduce: maximum or mean over the query heads of a kv head.
        standardise: whether scores of a query head are brought to mean 0 and standard deviation 1.
        trigonometric: whether the first term counts.
        concentration: whether |mu_f| is subtracted in the second term.
        parts: equal parts of the prompt that evict equally many entries (a third party's variant); 0: no parts.
        queries: safetensors file with `mean` [L, N, D] and `magnitude` [L, N, F] of a model's queries; not given: those
            of the prompt.
    """

    table_argument = "queries"
    needs = frozenset({"rope"})
    functions = frozenset({"rotation"})

    def __init__(
        self,
        furthest: int = 65536,
        aggregation: Literal["mean", "max"] = "mean",
        group_reduce: Literal["max", "mean"] = "max",
        standardise: bool = True,
        trigonometric: bool = True,
        concentration: bool = True,
        parts: int = 0,
        queries: str | None = None,
    ) -> None:
        super().__init__()
        if furthest < 1 or parts < 0:
            raise UserError(f"furthest={furthest} parts={parts}: expected furthest >= 1 and parts >= 0")
        self.distances = [2**power for power in range(furthest.bit_length())]
        self.aggregation, self.group_reduce = aggregation, group_reduce
        self.standardise, self.trigonometric, self.concentration = standardise, trigonometric, concentration
        self.parts = parts
        self.source = queries
        self.measured = None if queries is None else tensors.read(queries, QUERIES)
        if queries is None:
            self.statistics = frozenset({QueryFrequencies()})

    def forward(self, obs: Observation) -> Tensor:
        scores = self.raw_scores(obs)
        if self.standardise:
            valid = obs.valid.unsqueeze(2)
            count = valid.sum(-1, keepdim=True).clamp(min=1)
            scores = scores.masked_fill(~valid, 0.0)
            centred = (scores - scores.sum(-1, keepdim=True) / count).masked_fill(~valid, 0.0)
            scores = centred / (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)
        return scores.amax(2) if self.group_reduce == "max" else scores.mean(2)

    def raw_scores(self, obs: Observation) -> Tensor:
        """Scores [B, H, G, S] of every query head before they are standardised."""
        mean, magnitude = self._queries(obs)
        layout = _layout(obs)
        keys = obs.keys.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0)
        waves, scale = self._waves(obs, layout.pairs)
        sizes = torch.hypot(*layout.split(keys))  # with RoPE's scale, once
        mu = torch.complex(*(part.contiguous() for part in layout.split(mean)))
        spread = magnitude - mu.abs() if self.concentration else magnitude
        scores = torch.einsum("bhgf,bhsf->bhgs", spread * scale, sizes)
        scores = scores + torch.einsum("bhgd,bhsd->bhgs", layout.rest(mean), layout.rest(keys))
        if not self.trigonometric:
            return scores
        if self.aggregation == "mean":
            return scores + _real_product(mu * waves.mean(1)[:, None, None], keys, layout)
        first = _real_product(mu * waves[:, 0, None, None], keys, layout)
        for index in range(1, waves.shape[1]):
            first = torch.maximum(first, _real_product(mu * waves[:, index, None, None], keys, layout))
        return scores + first

    @property
    def refines(self) -> bool:
        return self.parts > 0

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """1 for entries that are kept, 0 for others: every part evicts its part, rounded by prefix sums."""
        ranked = scores.isfinite()
        count = ranked.sum(-1, keepdim=True)  # [B, H, 1]
        evicted = count + (scores == torch.inf).sum(-1, keepdim=True) - budgets.unsqueeze(-1)
        bounds = torch.arange(self.parts + 1, device=scores.device) * count // self.parts  # [B, H, parts + 1]
        quota = (bounds - evicted * bounds // count.clamp(min=1)).diff(dim=-1)
        place = ranked.cumsum(-1) - 1
        part = torch.searchsorted(bounds[..., 1:].contiguous(), place, right=True).clamp(0, self.parts - 1)
        part = torch.where(ranked, part, self.parts)  # the others after all
        by_score = scores.masked_fill(~ranked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        order = by_score.gather(-1, part.gather(-1, by_score).argsort(dim=-1, stable=True))
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        inside = part.clamp(max=self.parts - 1)
        return (rank - bounds.gather(-1, inside) < quota.gather(-1, inside)).float()

    def _queries(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Mean [B, H, G, D] and magnitudes [B, H, G, F] of the queries before RoPE."""
        dim = obs.keys.shape[3]
        if self.measured is None:
            gathered = obs.statistics[QueryFrequencies()]
            return gathered[..., :dim], gathered[..., dim:]
        layers, heads, have = self.measured["mean"].shape
        if obs.layer_idx >= layers or (heads, have) != (obs.queries.shape[1], dim):
            raise UserError(
                f"queries={self.source}: made for {layers} layers of {heads} heads of {have}, layer {obs.layer_idx} of "
                f"the model has {obs.queries.shape[1]} of {dim}"
            )
        mean, magnitude = (self.measured[name][obs.layer_idx].to(obs.keys.device) for name in QUERIES)
        batch, kv_heads = obs.keys.shape[:2]
        return (
            mean.unflatten(0, (kv_heads, -1)).expand(batch, -1, -1, -1),
            magnitude.unflatten(0, (kv_heads, -1)).expand(batch, -1, -1, -1),
        )

    def _waves(self, obs: Observation, pairs: int) -> tuple[Tensor, Tensor]:
        """Complex numbers s e^(i (t + d) w) [B, distances, F], and s [B, 1, 1, F]."""
        rope = obs.rope
        if rope is None:
            ones = torch.ones(len(obs.keys), 1, pairs, device=obs.keys.device)
            return torch.complex(ones, torch.zeros_like(ones)), ones.unsqueeze(1)
        cos, sin = rope.after(obs.length, 1)  # [B, 1, F] of position t
        distances = torch.tensor(self.distances, dtype=torch.float64, device=cos.device).view(-1, 1)
        angle = distances * rope.frequencies(obs.length).double()
        waves = torch.complex(cos, sin) * torch.polar(torch.ones_like(angle), angle)
        return waves.to(torch.complex64), torch.hypot(cos, sin).float().unsqueeze(1)


def _layout(obs: Observation) -> Layout:
    """The pairs of channels that the layer rotates; halves where nothing is known of it."""
    rope = obs.rope
    return Layout.halves(obs.keys.shape[3] // 2) if rope is None else rope.layout


def _real_product(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """Re(sum_f q_f conj k_f) [B, H, G, S] of complex queries [B, H, G, F] and the pairs of keys [B, H, S, D]."""
    joined = layout.join(queries.real, queries.imag)
    return torch.einsum("bhgd,bhsd->bhgs", joined, keys[..., layout.start : layout.end])
