"""Planning: from what was read of a prompt to scores and exact budgets, without a cache."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, Baseline
from learnkv.core.finite import Invalid, check_shape, without_nan
from learnkv.core.observation import Observation
from learnkv.core.plan import Plan, baseline_of
from learnkv.core.precision import Precision
from learnkv.core.scorer import Scorer, Scores
from learnkv.errors import UserError
from learnkv.ops.device import upload
from learnkv.ops.normal_scores import unit_scale
from learnkv.ops.round_to_budget import round_in_order, round_to_budget
from learnkv.policy.budget import Protected, protected_entries, with_spans
from learnkv.policy.byte_budget import ByteBudget, shared_levels, uniform_levels


@dataclass(frozen=True)
class Planner:
    """Scores all layers, splits the budget once over all of them and makes it exact.

    Args:
        scorer: importance of entries.
        allocator: how the budget is split over layers and heads.
        sinks: first tokens that are always kept, per head.
        recent: last tokens that are always kept, per head.
        precision: of what is kept; None: as it is.
    """

    scorer: Scorer
    allocator: Allocator
    sinks: int
    recent: int
    precision: Precision | None = None

    def with_bytes(self, spend: ByteBudget | None) -> "Planner":
        """The planner of a budget in bytes, at its precision; None: of entries."""
        return self if spend is None else replace(self, precision=spend.precision)

    def plan(
        self,
        observations: Sequence[Observation],
        lengths: Sequence[int],
        totals: Sequence[int],
        protected: Protected,
        fixed: Tensor | None = None,
        is_fixed: Sequence[bool] = (),
        spend: ByteBudget | None = None,
    ) -> Plan:
        """The plan for one batch of prompts.

        Args:
            observations: one for each layer.
            lengths: entries per head of each row.
            totals: entries to keep in each row, over all heads.
            protected: entries that are kept in any case, in every head of each row.
            fixed: [L, B, H] budgets of the rows that `is_fixed`; the allocator decides for the others.
            spend: bytes to spend, where budgets are in bytes; totals are those of its reference level.
        """
        device, count = observations[0].keys.device, len(observations)
        observations = [with_keep(obs, lengths, totals, count) for obs in observations]
        layers, invalid = [self.score(obs, protected) for obs in observations], list[Invalid]()
        scores = torch.stack([layer.scores.to(device) for layer in layers])
        scores = self.without_nan(scores, invalid)
        if fixed is not None and all(is_fixed):
            budgets = fixed.to(device)
            wanted = budgets.double()
        else:
            features = [layer.to(device) for layer in map(self.allocator.features, observations) if layer is not None]
            stacked = torch.stack(features) if features else None
            shared = (scores, stacked, lengths, protected.counts, baseline_of(layers, device), invalid)
            if spend is not None and not spend.precision.reference.independent:
                totals = spend.fitting(lengths, lambda trial: self._allocate(trial, *shared)[1])
            wanted, budgets = self._allocate(totals, *shared)
            if fixed is not None:
                rows = upload(is_fixed, device).view(1, -1, 1)
                budgets = torch.where(rows, fixed.to(device), budgets)
        levels = None if self.precision is None else uniform_levels(self.precision, budgets, wanted)
        if spend is not None and spend.precision.shares_bytes:
            per_head = upload(totals, device).to(torch.float64) / (count * scores.shape[2])
            baseline, unprotected = baseline_of(layers, device), self._unprotected(layers, device)
            ranking = self.allocator.ranking(scores, stacked, per_head, baseline)
            if ranking is not None and unprotected is not None:
                unprotected = self.allocator.ranking(unprotected, stacked, per_head, baseline)
            own = scores if spend.precision.raw_scores else unit_scale(scores)
            levels = shared_levels(spend, ranking, own, budgets, unprotected)
            wanted, budgets = levels.at_least[0], levels.counts.sum(0)
            totals = budgets.sum((0, 2)).tolist()
        ranked = scores
        if self.scorer.refines_layers:
            ranked = self.without_nan(self.refine_layers(observations, scores, budgets), invalid)
        if self.scorer.refines:
            refined = [self.refine(*layer) for layer in zip(observations, ranked, budgets, strict=True)]
            ranked = torch.stack([layer.to(device) for layer in refined])
            ranked = self.without_nan(ranked, invalid)
        return Plan(
            ranked, wanted, budgets, upload(protected.counts, device), sum(totals), scores, tuple(invalid), levels
        )

    def score(self, obs: Observation, protected: Protected) -> Scores:
        """Scores [B, H, S] of one layer `with_keep`, with protected entries at +inf and absent ones at -inf."""
        edges = upload(protected.edges, obs.positions.device).view(-1, 1, 1)
        spans = None if protected.spans is None else protected.spans.to(obs.positions.device, non_blocking=True)
        length = obs.length.view(-1, 1, 1)
        always = protected_entries(obs.positions, obs.valid, length, edges, self.recent, self.sinks)
        always = with_spans(always, obs.positions, obs.valid, spans)
        before = _versions(obs)
        result = self.scorer.score(obs)
        check_shape(result.scores, obs.valid.shape, f"{self.scorer.name}: scores of layer {obs.layer_idx}", "[B, H, S]")
        if _versions(obs) != before:
            raise UserError(f"{self.scorer.name} writes into the queries, keys or values of layer {obs.layer_idx}")
        scores = result.scores if result.scores.is_floating_point() else result.scores.float()
        scores = scores.masked_fill(scores.isinf(), torch.nan)  # infinite ones would count as protected
        return result._replace(scores=scores).masked(absent=~obs.valid, protected=always)

    def refine_layers(self, observations: Sequence[Observation], scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores [L, B, H, S] of all layers that rank within their heads, given their budgets [L, B, H]."""
        refined = self.scorer.refine_layers(observations, scores, budgets.to(scores.device)).float()
        check_shape(refined, scores.shape, f"{self.scorer.name}: refined scores", "[L, B, H, S]")
        return torch.where(scores.isfinite(), refined, scores)

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores [B, H, S] of one layer that rank within its heads, given their budgets [B, H]."""
        if not self.scorer.refines:
            return scores
        scores, budgets = scores.to(obs.keys.device), budgets.to(obs.keys.device)
        refined = self.scorer.refine(obs, scores, budgets).float()
        check_shape(refined, scores.shape, f"{self.scorer.name}: refined scores of layer {obs.layer_idx}", "[B, H, S]")
        return torch.where(scores.isfinite(), refined, scores)

    def without_nan(self, scores: Tensor, invalid: list[Invalid], first: int = 0) -> Tensor:
        """Scores [L, B, H, S] of layers from `first` on; NaN is refused or noted as in `finite.without_nan`."""
        return without_nan(scores, f"{self.scorer.name}: scores", invalid, first)

    def _unprotected(self, layers: Sequence[Scores], device: torch.device) -> Tensor | None:
        """[L, B, H, S] scores of all entries, by which protected ones get levels; None: they get the best.

        What heuristics give to entries that are protected may mean nothing. `Scorer.refine` chooses what is kept, such
        as a sample of the entries; the precision of each goes by what it was worth before.
        """
        own = [layer.unprotected.to(device) for layer in layers if layer.unprotected is not None]
        return torch.stack(own) if own else None

    def _allocate(
        self,
        totals: Sequence[int],
        scores: Tensor,
        features: Tensor | None,
        lengths: Sequence[int],
        protected: Sequence[int],
        baseline: Baseline | None,
        invalid: list[Invalid],
    ) -> tuple[Tensor, Tensor]:
        """Entries that the allocator requests [L, B, H], and the integers that spend the budget exactly."""
        entries, spend, at_least = (upload(numbers, scores.device) for numbers in (lengths, totals, protected))
        per_head = spend.to(torch.float64) / (scores.shape[0] * scores.shape[2])
        wanted = self.allocator.split(scores, features, per_head, baseline)
        check_shape(wanted, scores.shape[:3], f"{self.allocator.name}: budgets", "[L, B, H]")
        wanted = without_nan(wanted, f"{self.allocator.name}: budgets", invalid)
        exact = round_in_order if self.allocator.sequential else round_to_budget
        return wanted, exact(wanted, entries, spend, at_least)


def _versions(obs: Observation) -> list[int]:
    """How often the captured tensors were written into; of those of inference mode nothing is known."""
    return [part._version for part in (obs.queries, obs.keys, obs.values) if not part.is_inference()]


def with_keep(obs: Observation, lengths: Sequence[int], totals: Sequence[int], layers: int) -> Observation:
    """The observation with the fraction of each row that will be kept.

    Args:
        lengths: entries per head of each row.
        totals: entries to keep in each row, over all heads of `layers` layers.
    """
    heads = obs.keys.shape[1] * layers
    keep = [kept / (length * heads) for kept, length in zip(totals, lengths, strict=True)]
    return replace(obs, keep=upload(keep, obs.keys.device, torch.float64))
