"""A policy: what every heuristic and every learned predictor is at deployment and in training."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from learnkv.allocators.uniform import Uniform
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.eviction import Rerotate, compact
from learnkv.core.adapter import Adapter
from learnkv.core.allocator import Allocator, Baseline
from learnkv.core.component import Component
from learnkv.core.observation import CaptureSpec, Observation
from learnkv.core.page_selector import PageSelector
from learnkv.core.plan import Plan, started_at
from learnkv.core.scorer import Scorer, Scores
from learnkv.errors import UserError
from learnkv.ops.device import upload
from learnkv.ops.normal_scores import unit_scale
from learnkv.ops.round_to_budget import round_in_order, round_to_budget
from learnkv.ops.soft_topk import soft_topk
from learnkv.policy.budget import check_budget, entries_to_keep, protected_entries
from learnkv.policy.online import check_judge, relax_again, schedule_eviction
from learnkv.policy.paging import check_reading, read_pages

TEMPERATURE = 0.5


class Policy(Component):
    """Scorer, allocator and protected tokens; heuristics have no parameters.

    Args:
        scorer: importance of entries; None retains the whole prompt.
        allocator: how the budget is split over layers and heads; None is uniform.
        sinks: first tokens of the prompt that are always kept, per head.
        recent: last tokens of the prompt that are always kept, per head. Both count towards the budget and are
            clipped, recent tokens first served, to half of a row's budget.
        evict_interval: tokens read after compression that are held beside the budget, a batch's padding counted; as
            many are scored together with what is retained, each head is evicted down to its budget. 0: all are kept.
        decode: scorer of those evictions; None: `scorer`.
        rerotate: rotate what a head keeps to consecutive positions, from 0 on (`start`, as kvpress does) or up to that
            of the last token (`end`: distances count what is held, as in StreamingLLM); None: keys stay as they are.
        pages: lets a decode step read chosen pages of what is retained. Without a scorer the budget is what it reads.
        read: fraction of what is retained that a step reads, for a policy with a scorer and pages.
    """

    def __init__(
        self,
        scorer: Scorer | None,
        allocator: Allocator | None = None,
        sinks: int = 4,
        recent: int = 8,
        evict_interval: int = 0,
        decode: Scorer | None = None,
        rerotate: Rerotate | None = None,
        pages: PageSelector | None = None,
        read: float | None = None,
    ) -> None:
        super().__init__()
        if sinks < 0 or recent < 0:
            raise UserError(f"sinks={sinks} recent={recent}: expected numbers of tokens >= 0")
        check_judge(evict_interval, decode or scorer)
        self.scorer = scorer
        self.evict_interval, self.decode, self.rerotate = evict_interval, decode, rerotate
        self.allocator = allocator if allocator is not None else Uniform()
        check_reading(scorer is not None, pages, read)
        self.sinks, self.recent = sinks, recent
        self.pages, self.read = pages, read
        self.adapter: Adapter | None = None  # was trained beside it

    @property
    def capture_spec(self) -> CaptureSpec:
        """What has to be recorded of a prompt for this policy."""
        mine = CaptureSpec(self.allocator.window)
        for part in (self.scorer, self.decode):
            if part is not None:
                mine |= part.capture_spec
        if self.evict_interval and (judge := self.decode or self.scorer) is not None:
            mine |= CaptureSpec(statistics=judge.decode_capture)
        return mine

    @property
    def reads_once(self) -> bool:
        """Whether a layer can be evicted before the next one has read the prompt."""
        evicts = self.scorer is not None and not self.scorer.extra_passes
        return evicts and self.pages is None and (self.allocator.static or self.allocator.sequential)

    def plan(self, cache: CompressedCache, keep: float | None = None, budget: float | None = None) -> Plan:
        """Score every layer, split the budget once over all of them, and make it exact.

        Args:
            cache: holds a complete prompt, nothing evicted.
            keep: fraction of each row's prompt entries to keep, 0 < keep <= 1; or
            budget: tokens per head on average.

        Raises:
            UserError: for a budget below one entry per head, or a cache that has been compressed already.
        """
        assert self.scorer is not None
        cache.seal()
        total, protected = self.spending(cache, keep, budget)
        obs = [self.obs(cache, at, total) for at in range(len(cache.compressible))]
        self._check_recorded(obs[0])
        return self.plan_within(cache, obs, self.scorer, total, protected)

    def plan_within(
        self,
        cache: CompressedCache,
        obs: list[Observation],
        scorer: Scorer,
        total: list[int],
        protected: list[int],
        decided: list[bool] | None = None,
    ) -> Plan:
        """The plan for `total` entries per row, of which `protected` per head are kept in any case.

        Rows that are `decided` keep the budgets that the cache has.
        """
        device = obs[0].keys.device
        judged = [self.judge(scorer, one, protected) for one in obs]
        scores = torch.stack([one.scores.to(device) for one in judged])
        start = started_at(judged, device)
        known = [one.to(device) for one in map(self.allocator.features, obs) if one is not None]
        features = torch.stack(known) if known else None
        if decided is not None and all(decided) and cache.budgets is not None:
            budgets = cache.budgets.to(device)
            wanted = budgets.double()
        else:
            wanted, budgets = self._allocate(cache, scores, features, total, protected, start)
        if decided is not None and cache.budgets is not None:
            old = upload(decided, device).view(1, -1, 1)
            budgets = torch.where(old, cache.budgets.to(device), budgets)
        within = scores
        if scorer.refines:
            refined = [self.refine(scorer, *one) for one in zip(obs, scores, budgets, strict=True)]
            within = torch.stack([one.to(device) for one in refined])
        return Plan(within, wanted, budgets, upload(protected, device), sum(total), scores)

    def _check_recorded(self, obs: Observation) -> None:
        """Raise where a scorer would silently judge by less than it asks for."""
        recorded, slots, wants = obs.queries.shape[2], obs.keys.shape[2], self.capture_spec
        if recorded < min(wants.window, slots):
            raise UserError(
                f"window={recorded}: the policy reads the last {wants.window} queries of a prompt; "
                f"prefill it with window={wants.window}"
            )
        if wants.hidden and obs.hidden is None:
            raise UserError("the policy reads hidden states: hand it to prefill, among policies= or as policy=")
        needed = {one for one in wants.statistics if not one.for_gradients}
        if not needed | wants.extra_passes <= obs.statistics.keys():
            raise UserError(
                f"the policy's {type(self.scorer).__name__} reads more of a prompt than keys, values and the last "
                "queries, or its weights have changed since: hand it to prefill, among policies= or as policy="
            )

    def spending(self, cache: CompressedCache, keep: float | None, budget: float | None) -> tuple[list[int], list[int]]:
        """Entries to keep in each row, and how many per head are protected."""
        layers = cache.compressed_layers()
        heads = layers[0].heads * len(layers)
        total = entries_to_keep(cache, heads, keep, budget)
        protected = [
            min(self.sinks + self.recent, kept // (2 * heads), n)
            for kept, n in zip(total, cache.prompt_lengths, strict=True)
        ]
        return total, protected

    def _allocate(
        self,
        cache: CompressedCache,
        scores: Tensor,
        features: Tensor | None,
        total: list[int],
        protected: list[int],
        start: Baseline | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the allocator wants [L, B, H] and the integers that spend the budget exactly."""
        entries, spend, at_least = (upload(numbers, scores.device) for numbers in (cache.lengths, total, protected))
        per_head = spend.to(torch.float64) / (scores.shape[0] * scores.shape[2])
        wanted = self.allocator.split(scores, features, per_head, start)
        exact = round_in_order if self.allocator.sequential else round_to_budget
        return wanted, exact(wanted, entries, spend, at_least)

    @staticmethod
    def obs(cache: CompressedCache, at: int, total: list[int]) -> Observation:
        """What the scorer may see of one layer, and how much of every row will be kept."""
        layer = cache.compressed_layers()[at]
        heads = layer.heads * len(cache.compressible)
        keep = [kept / (n * heads) for kept, n in zip(total, cache.lengths, strict=True)]
        return replace(layer.observation(), keep=upload(keep, layer.device, torch.float64))

    @staticmethod
    def refine(scorer: Scorer, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores [B, H, S] of one layer that decide within its heads, whose budgets [B, H] are known now."""
        if not scorer.refines:
            return scores
        scores, budgets = scores.to(obs.keys.device), budgets.to(obs.keys.device)
        return torch.where(scores.isfinite(), scorer.refine(obs, scores, budgets).float(), scores)

    def judge(self, scorer: Scorer, obs: Observation, protected: list[int]) -> Scores:
        """Scores [B, H, S] of one layer with protected entries at +inf and absent ones at -inf."""
        return scorer.judge(obs).masked(absent=~obs.valid, protected=self._protects(obs, protected))

    def _protects(self, obs: Observation, protected: list[int]) -> Tensor:
        """[B, H, S] True for the first `sinks` and last `recent` tokens, clipped to `protected` per row."""
        both = upload(protected, obs.positions.device).view(-1, 1, 1)
        length = obs.length.view(-1, 1, 1)
        return protected_entries(obs.positions, obs.valid, length, both, self.recent, self.sinks)

    def compress(
        self, cache: CompressedCache, keep: float | None = None, budget: float | None = None
    ) -> CompressedCache:
        """Evict in place everything that the plan does not keep, and let steps read pages of the rest.

        Forks of the cache are not touched.
        """
        check_budget(keep, budget)
        cache.seal()
        if keep == 1:
            return cache
        if self.scorer is not None:
            with torch.no_grad():
                plan = self.plan(cache, keep, budget)
                cache.schedule = schedule_eviction(self, cache, keep, budget)
                cache.evict(plan.scores, plan.budgets, plan.total, rerotate=self.rerotate)
            cache.budgets = plan.budgets
        if self.pages is not None:
            read_pages(self.pages, cache, keep, budget, 1.0 if self.read is None else self.read)
        cache.adapter = self.adapter
        return cache

    def relax(
        self,
        cache: CompressedCache,
        keep: float | None = None,
        budget: float | None = None,
        *,
        plan: Plan | None = None,
        temperature: float = TEMPERATURE,
        soft: bool = False,
    ) -> CompressedCache:
        """A fork that attends to what `compress` would keep, and passes gradients on to the plan.

        Every entry, kept or evicted, has the gradient of its mask, which the soft top-k takes for its own and passes on
        to scores and budgets. With `evict_interval`, the fork evicts in the same way while tokens are added, each time
        that `evict_if_due` is called when so many have been.

        Args:
            cache, keep, budget: as for `compress`.
            plan: what to keep where that has been planned already, for the same `keep` or `budget`.
            temperature: width of the soft top-k in units of normal scores.
            soft: attend to every entry as much as the soft top-k keeps it instead, and evict nothing later: not what is
                deployed.
        """
        check_budget(keep, budget)
        if self.rerotate is not None:
            raise UserError(f"rerotate={self.rerotate}: expected none in training, where evicted keys stay in place")
        if self.pages is not None:
            raise UserError("pages: query-aware reading is not trained, expected a policy without pages")
        cache.seal()
        if self.scorer is None or keep == 1:
            return cache.fork()
        plan = self.plan(cache, keep, budget) if plan is None else plan
        student = cache.fork()
        student.adapter = self.adapter
        if not soft:
            student.schedule = schedule_eviction(self, cache, keep, budget, partial(relax_again, self, temperature))
        self.hold(student, plan, temperature, soft)
        return student

    def hold(self, student: CompressedCache, plan: Plan, temperature: float, soft: bool = False) -> None:
        """Let a student attend to what `plan` keeps, and its gates have the gradient of the plan."""
        gates = soft_topk(unit_scale(plan.scores), plan.wanted, temperature).unbind()
        layers, live = student.compressed_layers(), None
        student.budgets = plan.budgets
        if soft:
            for layer, gate in zip(layers, gates, strict=True):
                layer.gate(gate.to(layer.device))
            return
        if student.schedule is not None:
            student.schedule, live = replace(student.schedule, wanted=plan.wanted), student.schedule.capture_spec
        for at, segment in compact(layers, plan.scores.detach(), plan.budgets, plan.total, live, None):
            layers[at].relax(segment, gates[at], live)
