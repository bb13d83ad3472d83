"""TriAttention scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.ops.reduce_layers import reduce_layers
from learnkv.ops.rotary import Layout


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

    The published code measures mu and m once per model (before q_norm where a model has one, while here they are those
    of the queries that RoPE rotates) and evicts while tokens are generated: whenever 128 have been added to the budget
    the cache is brought back to it (`triattention_decode`), with the prompt pinned, which is not done here. One set of
    positions per kv head serves all layers, or one set serves all heads (`sharing`); where heads have kept different
    tokens before, a token counts in those heads and layers that have it.

    Args:
        furthest: largest distance of a future query, in positions.
        aggregation: mean or maximum over the distances.
        group_reduce: maximum or mean over the query heads of a kv head.
        standardise: whether scores of a query head are brought to mean 0 and standard deviation 1.
        trigonometric: whether the first term counts.
        concentration: whether |mu_f| is subtracted in the second term.
        parts: equal parts of the prompt that evict equally many entries (a third party's variant); 0: no parts.
        sharing: what ranks the entries of a head: its own scores (`none`, the original's per_layer_perhead), the mean
            of those of its number in all layers (`per_head`, the default of the original's command), or the maximum
            over all heads and layers (`union`, the default of its class).
        queries: safetensors file with the queries and frequencies of a model (`tensors.FREQUENCIES`), or `reference`;
            not given: those of the prompt, which are not known of tokens that come after it.
    """

    status = "numbers"
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
        sharing: Literal["none", "per_head", "union"] = "none",
        queries: str | None = None,
    ) -> None:
        super().__init__()
        if furthest < 1 or parts < 0:
            raise UserError(f"furthest={furthest} parts={parts}: expected furthest >= 1 and parts >= 0")
        self.distances = [2**power for power in range(furthest.bit_length())]
        self.aggregation, self.group_reduce = aggregation, group_reduce
        self.standardise, self.trigonometric, self.concentration = standardise, trigonometric, concentration
        self.parts, self.sharing = parts, sharing
        self.source = queries
        self.measured: dict[str, Tensor] | None = None
        if queries is None:
            self.statistics = frozenset({QueryFrequencies()})
        else:
            file = locate(queries, "query_frequencies.safetensors")
            self.measured = tensors.read(file, tensors.FREQUENCIES)
            self.needs, self.functions = frozenset(), frozenset()

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
        mean, magnitude, waves, scale, layout = self._measured(obs) if self.measured else self._of_prompt(obs)
        keys = obs.keys.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0)
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
    def refines_layers(self) -> bool:
        return self.sharing != "none"

    def refine_layers(self, observations: Sequence[Observation], scores: Tensor, budgets: Tensor) -> Tensor:
        """The scores that layers, and with `union` heads too, have in common."""
        if self.sharing == "per_head":
            return reduce_layers(observations, scores, "mean")
        return reduce_layers(observations, scores, "max", over_heads=True)

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

    def _of_prompt(self, obs: Observation) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout]:
        """As `_measured`, of the prompt's own queries and the rotation that the model applies."""
        dim, layout, rope = obs.keys.shape[3], _layout(obs), obs.rope
        gathered = obs.statistics[QueryFrequencies()]
        if rope is None:
            ones = torch.ones(len(obs.keys), 1, layout.pairs, device=obs.keys.device)
            return gathered[..., :dim], gathered[..., dim:], torch.complex(ones, 0 * ones), ones.unsqueeze(1), layout
        cos, sin = rope.after(obs.length, 1)  # [B, 1, F] of position t
        waves = torch.complex(cos, sin) * self._ahead(rope.frequencies(obs.length).double())
        scale = torch.hypot(cos, sin).float().unsqueeze(1)
        return gathered[..., :dim], gathered[..., dim:], waves.to(torch.complex64), scale, layout

    def _measured(self, obs: Observation) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout]:
        """Mean [B, H, G, D] and magnitudes [B, H, G, F] of queries, s e^(i (t + d) w) [B, distances, F], s, layout."""
        assert self.measured is not None
        layers, heads, dim = self.measured["mean"].shape
        known = obs.queries.shape[2] > 0  # without a window no queries are captured
        expected = (obs.queries.shape[1] if known else heads, obs.keys.shape[3])
        if obs.layer_idx >= layers or (heads, dim) != expected or heads % obs.keys.shape[1]:
            raise UserError(
                f"queries={self.source}: made for {layers} layers of {heads} heads of {dim}, layer {obs.layer_idx} of "
                f"the model has {expected[0]} of {expected[1]}; learnkv calibrate model=MODEL out=FOLDER makes a file"
            )
        own = {name: tensor[obs.layer_idx].to(obs.keys.device) for name, tensor in self.measured.items()}
        batch, kv_heads = obs.keys.shape[:2]
        mean, magnitude = (own[name].unflatten(0, (kv_heads, -1)).expand(batch, -1, -1, -1) for name in _QUERIES)
        frequency = own["frequency"].double()
        now = torch.polar(own["scale"].double().expand(batch, 1, -1), obs.length.view(-1, 1, 1) * frequency)
        waves = (now * self._ahead(frequency)).to(torch.complex64)
        layout = Layout(*(int(part) for part in self.measured["layout"][obs.layer_idx].tolist()))
        return mean, magnitude, waves, own["scale"].view(1, 1, 1, -1), layout

    def _ahead(self, frequency: Tensor) -> Tensor:
        """Complex numbers e^(i d w) [distances, F] of frequencies [F] float64."""
        distances = torch.tensor(self.distances, dtype=torch.float64, device=frequency.device).view(-1, 1)
        angle = distances * frequency
        return torch.polar(torch.ones_like(angle), angle)


_QUERIES = ("mean", "magnitude")


def _layout(obs: Observation) -> Layout:
    """The pairs of channels that the layer rotates; halves where nothing is known of it."""
    rope = obs.rope
    return Layout.halves(obs.keys.shape[3] // 2) if rope is None else rope.layout


def _real_product(queries: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """Re(sum_f q_f conj k_f) [B, H, G, S] of complex queries [B, H, G, F] and the pairs of keys [B, H, S, D]."""
    joined = layout.join(queries.real, queries.imag)
    return torch.einsum("bhgd,bhsd->bhgs", joined, keys[..., layout.start : layout.end])
