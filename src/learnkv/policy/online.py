"""Online eviction: while tokens are added, the tail is merged and entries are evicted again."""

from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.eviction import Rerotate
from learnkv.cache.merge_tail import merge_tail
from learnkv.cache.schedule import EvictionSchedule
from learnkv.core.allocator import Allocator
from learnkv.core.finite import Invalid
from learnkv.core.observation import CaptureSpec, Observation
from learnkv.core.residual_store import ResidualStore
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.device import upload
from learnkv.policy.budget import Protected, entries_to_keep, protected_per_head
from learnkv.policy.byte_budget import ByteBudget, uniform_levels
from learnkv.policy.planner import Planner, with_keep
from learnkv.policy.relax import relax_to_plan


def check_online(interval: int, scorer: Scorer | None, allocator: Allocator | None = None) -> None:
    """Raise for a negative interval, and where parts read of a prompt what is not kept of later tokens."""
    if not isinstance(interval, Integral) or interval < 0:
        raise UserError(
            f"evict_interval={interval}: expected a number of tokens, 0 to keep all that come after the prompt"
        )
    if interval and scorer is not None and (scorer.needs or scorer.extra_passes):
        raise UserError(
            f"evict_interval={interval}: {type(scorer).__name__} reads of a prompt what is not held of "
            "later tokens; expected another scorer as decode"
        )
    if interval and allocator is not None and allocator.statistics:
        raise UserError(f"evict_interval={interval}: {allocator.name} reads the queries of a prompt; expected 0")


class _Merge(NamedTuple):
    """The tail of a cache that is being merged, and the budgets of the entries together."""

    positions: Tensor
    """[B, M] position of each slot of the tail, -1 for padding."""
    totals: list[int]
    """Entries to keep in each row."""
    protected: Protected
    """Protected entries of each row."""
    evicted: list[bool]
    """Whether a row has evicted anything before."""


@dataclass(frozen=True)
class OnlineEviction:
    """Evicts again, down to the budget, whenever `interval` tokens have been added.

    As long as a row holds everything, its budget is split over layers and heads at each eviction. Once it has evicted,
    its heads keep their budgets.

    Args:
        planner: with the scorer of decoded tokens.
        interval: slots of the tail at which the cache evicts.
        rerotate, residual: as of `CompressedCache.evict`.
    """

    planner: Planner
    interval: int
    rerotate: Rerotate | None = None
    residual: ResidualStore | None = None

    @property
    def capture_spec(self) -> CaptureSpec:
        """What is captured of decoded tokens."""
        scorer, allocator = self.planner.scorer, self.planner.allocator
        return CaptureSpec(max(scorer.window, allocator.window), statistics=scorer.decode_capture)

    def with_bytes(self, spend: ByteBudget | None) -> "OnlineEviction":
        """The same where the prompt's budget is in bytes; None: in entries."""
        return replace(self, planner=self.planner.with_bytes(spend))

    def schedule_eviction(
        self,
        cache: CompressedCache,
        keep: float | None,
        budget: float | None,
        temperature: float | None = None,
        spend: ByteBudget | None = None,
    ) -> EvictionSchedule:
        """The schedule of a cache that is about to be compressed.

        Args:
            keep, budget: of the compression; `keep` counts the prompt's tokens only.
            temperature: of a student, which is relaxed instead; None: evict.
            spend: bytes of the prompt, which later tokens share; None: the budget is in entries.
        """
        heads = _heads(cache)
        if spend is not None:
            kept = spend.totals(cache.prompt_lengths)
        else:
            kept = entries_to_keep(cache.prompt_lengths, heads, keep, budget)
        most = kept if budget is None else [round(budget * heads)] * len(kept)
        evict = self.evict if temperature is None else partial(self.relax_again, temperature=temperature)
        deferred = temperature is not None
        return EvictionSchedule(self.interval, tuple(most), tuple(kept), self.capture_spec, evict, deferred)

    @torch.no_grad()
    def evict(self, cache: CompressedCache) -> None:
        """Merge the tail and evict until every row is within its budget."""
        budgets, merge = cache.budgets, self._merge(cache)
        assert budgets is not None
        longest, of_layer = (part.tolist() for part in (budgets.amax((1, 2)), budgets.sum((1, 2))))
        layers = len(of_layer)
        if all(merge.evicted) and not self.planner.scorer.refines_layers:  # budgets are fixed: one layer at a time
            for layer_idx, fixed in enumerate(budgets):
                obs = self._merged(cache, layer_idx, longest[layer_idx], merge)
                obs = with_keep(obs, cache.lengths, merge.totals, layers)
                scores = self.planner.refine(obs, self.planner.score(obs, merge.protected).scores, fixed)
                invalid = list[Invalid]()
                scores = self.planner.without_nan(scores[None], invalid, layer_idx)[0]
                cache.invalid += tuple(invalid)
                fixed = fixed.unsqueeze(0).to(scores.device)
                levels = None
                if self.planner.precision is not None:
                    levels = uniform_levels(self.planner.precision, fixed, fixed.double())
                carry(self, cache, fixed, layer_idx)
                where = (of_layer[layer_idx], layer_idx, self.rerotate)
                cache.evict(scores.unsqueeze(0), fixed, *where, levels, self.residual)
            return
        observations = [self._merged(cache, layer_idx, max(longest), merge) for layer_idx in range(layers)]
        plan = self.planner.plan(observations, cache.lengths, merge.totals, merge.protected, budgets, merge.evicted)
        carry(self, cache, plan.budgets)
        cache.evict(plan.scores, plan.budgets, plan.total, 0, self.rerotate, plan.levels, self.residual)
        cache.budgets = plan.budgets
        cache.invalid += plan.invalid

    def relax_again(self, student: CompressedCache, temperature: float) -> None:
        """The training variant of `evict`: nothing is freed, and the masks of kept and evicted entries have gradients.

        Entries evicted before cannot come back and have no gradient, and keys and values of the tail are constants:
        a token trains the latest eviction before it.
        """
        schedule, budgets, merge = student.schedule, student.budgets, self._merge(student)
        assert schedule is not None
        assert schedule.wanted is not None
        assert budgets is not None
        longest = int(budgets.max())
        observations = [self._merged(student, layer_idx, longest, merge) for layer_idx in range(len(budgets))]
        plan = self.planner.plan(observations, student.lengths, merge.totals, merge.protected, budgets, merge.evicted)
        student.invalid += plan.invalid
        fixed = upload(merge.evicted, plan.wanted.device).view(1, -1, 1)
        wanted = torch.where(fixed, schedule.wanted, plan.wanted)
        relax_to_plan(student, replace(plan, wanted=wanted), temperature, residual=self.residual)

    def _merge(self, cache: CompressedCache) -> _Merge:
        """Count the tail among the tokens that budgets are fractions of."""
        schedule, heads = cache.schedule, _heads(cache)
        assert schedule is not None
        evicted = [kept < n * heads for kept, n in zip(schedule.kept, cache.lengths, strict=True)]
        positions, new = _count_tail(cache)
        rows = zip(schedule.budget, schedule.kept, new, strict=True)
        totals = [min(most, kept + more * heads) for most, kept, more in rows]
        sinks, recent = self.planner.sinks, self.planner.recent
        protected = protected_per_head(sinks, recent, cache.lengths, schedule.budget, heads, cache.protection)
        cache.schedule = replace(schedule, kept=tuple(totals))
        return _Merge(positions, totals, protected, evicted)

    @staticmethod
    def _merged(cache: CompressedCache, layer_idx: int, longest: int, merge: _Merge) -> Observation:
        """Merge the tail of one layer, whose heads retain at most `longest` entries, and observe the result."""
        layer = cache.compressed_layers()[layer_idx]
        merge_tail(layer, longest, merge.positions.to(layer.device))
        return layer.observation()


def carry(online: OnlineEviction | None, cache: CompressedCache, budgets: Tensor, first: int = 0) -> None:
    """Keep with the entries what the scorer of later evictions has to know of this one.

    Args:
        online: the evictions to come; None: there are none.
        budgets: [L, B, H] of the layers from `first` on.
    """
    if online is None:
        return
    layers = cache.compressed_layers()[first : first + len(budgets)]
    remembered = online.planner.scorer.carry_layers([layer.observation() for layer in layers], budgets)
    for layer, new in zip(layers, remembered, strict=True):
        layer.capture.statistics = {**layer.capture.statistics, **dict(new)}


def _count_tail(cache: CompressedCache) -> tuple[Tensor, list[int]]:
    """Add the tail's tokens to `cache.lengths`; returns its positions [B, M], -1 for padding, and each row's tokens."""
    cache.tail_mask = is_token = cache.is_token()
    base = upload(cache.prompt_lengths, is_token.device).unsqueeze(-1)
    begin = is_token.shape[1] - cache.tail_length
    positions = torch.where(is_token, base + is_token.cumsum(-1) - 1, -1)[:, begin:]
    new = is_token[:, begin:].sum(-1).tolist()
    cache.covered = [length + more for length, more in zip(cache.lengths, new, strict=True)]
    return positions, new


def _heads(cache: CompressedCache) -> int:
    layers = cache.compressed_layers()
    return layers[0].heads * len(layers)
