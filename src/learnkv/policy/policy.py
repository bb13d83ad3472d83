"""A policy: what a prompt is compressed by, heuristic or learned, at deployment and in training."""

import copy
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

from learnkv.allocators.uniform import Uniform
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.eviction import Rerotate
from learnkv.core.adapter import Adapter
from learnkv.core.allocator import Allocator
from learnkv.core.component import Component
from learnkv.core.entry_selector import AnySelector
from learnkv.core.observation import CaptureSpec
from learnkv.core.plan import Plan
from learnkv.core.precision import Precision
from learnkv.core.residual_store import ResidualStore
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.policy.base_parts import base_part, base_precision
from learnkv.policy.budget import Protected, entries_to_keep, protected_per_head
from learnkv.policy.byte_budget import ByteBudget, ByteCount, check_countable, check_precision, check_spend
from learnkv.policy.captured import check_captured, record_compression, refuse_inference_tensors
from learnkv.policy.model_sizes import check_sizes, sizes_of
from learnkv.policy.online import OnlineEviction, carry, check_online
from learnkv.policy.page_budget import check_read, read_pages
from learnkv.policy.planner import Planner
from learnkv.policy.relax import relax_to_plan
from learnkv.policy.residual import check_residual, refuse_soft_residual
from learnkv.precision.uniform import UniformPrecision, as_precision
from learnkv.residuals.moments import as_residual
from learnkv.scorers.constant import Constant

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
            of the last token (`end`: distances count retained entries, as in StreamingLLM); None: keys stay.
        pages: lets a decode step read chosen pages of what is retained. Without a scorer the budget is what it reads.
        read: fraction of what is retained that a step reads, for a policy with a scorer and pages.
        precision: of what is kept: bits (16, 8, 4, 3, 2), `{keys: 4, values: 3}`, or a `Precision`; None: as it is.
        residual: what is remembered of evicted entries, `moments` or a `ResidualStore`; its bytes count.
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
        pages: AnySelector | None = None,
        read: float | None = None,
        precision: Precision | int | dict[str, int] | None = None,
        residual: ResidualStore | str | None = None,
    ) -> None:
        super().__init__()
        if not all(isinstance(count, Integral) and count >= 0 for count in (sinks, recent)):
            raise UserError(f"sinks={sinks} recent={recent}: expected numbers of tokens >= 0")
        if rerotate not in (None, "start", "end"):
            raise UserError(f"rerotate={rerotate!r}: expected start, end or null")
        check_online(evict_interval, decode or scorer, allocator)
        self.scorer = scorer
        self.evict_interval, self.decode, self.rerotate = evict_interval, decode, rerotate
        self.allocator = allocator if allocator is not None else Uniform()
        check_read(scorer is not None, pages, read)
        self.sinks, self.recent = sinks, recent
        self.pages, self.read = pages, read
        self.precision, self.residual = as_precision(precision), as_residual(residual)
        check_precision(self.precision, self.scorer, self.evict_interval, self.pages, self.rerotate)
        check_residual(self.residual, self.scorer, self.pages, self.rerotate)
        self.adapter: Adapter | None = None  # trained together with the policy
        self.trained_for: Mapping[str, Any] | None = None
        """Description of the model that the policy was trained for, as its manifest has it."""
        self.other_weights: str | None = None
        """One line where the policy was loaded for a model of other weights."""

    @property
    def precision_name(self) -> str:
        """Bits of what is kept, in tables: 16, 4, K4V3, learned."""
        return "16" if self.precision is None else self.precision.label

    def with_precision(self, precision: Precision | int | dict[str, int] | None) -> "Policy":
        """A policy of the same parts, with another precision."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        twin.precision = as_precision(precision)
        twin.__dict__["_arguments"] = {**self.__dict__["_arguments"], "precision": precision}
        check_precision(twin.precision, self.scorer, self.evict_interval, self.pages, self.rerotate)
        return twin

    @property
    def planner(self) -> Planner:
        """The planner of a prompt."""
        return Planner(self.scorer or Constant(), self.allocator, self.sinks, self.recent, self.precision)

    @property
    def online(self) -> OnlineEviction | None:
        """The evictions during decoding; None for a policy that keeps all tokens after the prompt."""
        scorer = self.decode or self.scorer
        if not self.evict_interval or scorer is None:
            return None
        planner = Planner(scorer, self.allocator, self.sinks, self.recent, self.precision)
        return OnlineEviction(planner, self.evict_interval, self.rerotate, self.residual)

    @property
    def capture_spec(self) -> CaptureSpec:
        """What a prefill captures for this policy."""
        functions = self.allocator.functions if self.rerotate is None else self.allocator.functions | {"rotation"}
        window = max(self.allocator.window, self.pages.window if self.pages is not None else 0)
        window = max(window, self.precision.query_window if self.precision is not None else 0)
        spec = CaptureSpec(window, statistics=self.allocator.statistics, functions=functions)
        for scorer in (self.scorer, self.decode):
            if scorer is not None:
                spec |= scorer.capture_spec
        return spec if self.online is None else spec | CaptureSpec(statistics=self.online.capture_spec.statistics)

    @property
    def reads_once(self) -> bool:
        """Whether a layer can be evicted before the next one has read the prompt."""
        evicts = self.scorer is not None and not (self.scorer.extra_passes or self.scorer.refines_layers)
        evicts = evicts and (self.precision is None or self.precision.known_bytes)
        return evicts and self.pages is None and (self.allocator.static or self.allocator.sequential)

    def base_policy(self) -> "Policy":
        """The policy that a learned one starts from: its parts without their learned corrections."""
        return Policy(
            base_part(self.scorer),
            base_part(self.allocator),
            self.sinks,
            self.recent,
            self.evict_interval,
            base_part(self.decode),
            self.rerotate,
            self.pages,
            self.read,
            base_precision(self.precision),
            self.residual,
        )

    def plan(
        self,
        cache: CompressedCache,
        keep: float | None = None,
        budget: float | None = None,
        bytes: ByteCount | None = None,
    ) -> Plan:
        """Score every layer, split the budget once over all of them, and make it exact.

        Args:
            cache: holds a complete prompt, nothing evicted.
            keep: fraction of each row's prompt entries to keep, 0 < keep <= 1; or
            budget: tokens per head on average; or
            bytes: a fraction of the 16-bit cache, or bytes of each prompt (`parse_bytes`). It counts codes, scales,
                positions and tables, not the tail, and is never exceeded. Without a precision entries have 16 bits.

        Raises:
            UserError: for a budget below one entry per head, or a cache that has been compressed already.
        """
        cache.seal()
        if any(weight.requires_grad for weight in self.parameters()):
            refuse_inference_tensors(cache)
        spend = self.byte_budget(cache, bytes)
        totals, protected = self.totals(cache, keep, budget, spend)
        observations = [layer.observation() for layer in cache.compressed_layers()]
        self.check_sizes(sizes_of(cache, observations[0]), cache.model_name)
        check_captured(self.capture_spec, "" if self.scorer is None else self.scorer.name, observations[0])
        return self.planner.with_bytes(spend).plan(observations, cache.lengths, totals, protected, spend=spend)

    def byte_budget(self, cache: CompressedCache, byte_count: ByteCount | None) -> ByteBudget | None:
        """What `byte_count` bytes hold of a cache; None: the budget is in entries."""
        if byte_count is None:
            return None
        return ByteBudget.of(cache, self.precision or UniformPrecision(16, 16), byte_count, self.residual)

    def totals(
        self, cache: CompressedCache, keep: float | None, budget: float | None, spend: ByteBudget | None = None
    ) -> tuple[list[int], Protected]:
        """Entries to keep in each row, and those that are protected; of bytes those at the reference level."""
        layers, lengths = cache.compressed_layers(), cache.prompt_lengths
        heads = layers[0].heads * len(layers)
        totals = entries_to_keep(lengths, heads, keep, budget) if spend is None else spend.totals(lengths)
        if self.scorer is None and any(total < heads * n for total, n in zip(totals, lengths, strict=True)):
            raise UserError("a policy without a scorer keeps every entry: expected keep=1, or bytes that hold them all")
        return totals, protected_per_head(self.sinks, self.recent, lengths, totals, heads, cache.protection)

    def check_sizes(self, sizes: Mapping[str, int], model: str) -> None:
        """Raise UserError for a model of other sizes than a learned component was made for."""
        check_sizes(self, self.trained_for, sizes, model)

    def check_spend(self, keep: float | None, budget: float | None, byte_count: ByteCount | None) -> None:
        """Raise UserError unless exactly one kind of budget is given that the policy can spend."""
        check_spend(keep, budget, byte_count, self.precision)
        if byte_count is not None:
            check_countable(byte_count, self.pages, self.online.planner.scorer if self.online else None, self.rerotate)

    def compress(
        self,
        cache: CompressedCache,
        keep: float | None = None,
        budget: float | None = None,
        bytes: ByteCount | None = None,
    ) -> CompressedCache:
        """Evict in place everything that the plan does not keep, and let decode steps read pages of the rest.

        Forks of the cache are not touched.

        Args:
            cache, keep, budget, bytes: as for `plan`.
        """
        self.check_spend(keep, budget, bytes)
        cache.seal()
        if keep == 1 and self.precision is None:
            return cache
        if self.scorer is not None or self.precision is not None or bytes is not None:
            with torch.no_grad():
                plan = self.plan(cache, keep, budget, bytes)
                self.schedule(cache, keep, budget, bytes)
                carry(self.online, cache, plan.budgets)
                cache.evict(plan.scores, plan.budgets, plan.total, 0, self.rerotate, plan.levels, self.residual)
            cache.budgets = plan.budgets
            cache.invalid += plan.invalid
        if self.pages is not None:
            read_pages(cache, self.pages, self.read, keep, budget)
        record_compression(cache, self.spec(), self.adapter, keep=keep, budget=budget, bytes=bytes)
        return cache

    def schedule(
        self, cache: CompressedCache, keep: float | None, budget: float | None, byte_count: ByteCount | None
    ) -> None:
        """Let a cache that is about to be compressed evict again while tokens are added, where the policy does."""
        cache.schedule = None
        if self.online is not None:
            spend = self.byte_budget(cache, byte_count)
            cache.schedule = self.online.with_bytes(spend).schedule_eviction(cache, keep, budget, spend=spend)

    def relax(
        self,
        cache: CompressedCache,
        keep: float | None = None,
        budget: float | None = None,
        bytes: ByteCount | None = None,
        *,
        plan: Plan | None = None,
        temperature: float = TEMPERATURE,
        soft: bool = False,
    ) -> CompressedCache:
        """A fork that attends to what `compress` would keep, and passes gradients on to the plan.

        The backward pass computes d loss / d mask for every entry, kept or evicted, takes it for the gradient of the
        soft top-k, and passes it on to scores and budgets. With `evict_interval`, the fork evicts in the same way while
        tokens are added, whenever `evict_if_due` is called after so many.

        Args:
            cache, keep, budget, bytes: as for `compress`.
            plan: a plan for the same budget; None: plan now.
            temperature: width of the soft top-k in units of normal scores.
            soft: multiply every entry's softmax weight by its soft gate instead, and evict nothing later; this is not
                what is deployed.
        """
        self.check_spend(keep, budget, bytes)
        if self.rerotate is not None:
            raise UserError(f"rerotate={self.rerotate}: expected none in training, where evicted keys stay in place")
        if self.pages is not None:
            raise UserError("pages: query-aware reading is not trained, expected a policy without pages")
        refuse_soft_residual(self.residual, soft)
        cache.seal()
        refuse_inference_tensors(cache)
        if self.online is not None and self.precision is not None:
            raise UserError(
                f"evict_interval={self.evict_interval} precision={self.precision.label}: not trained together"
            )
        if self.scorer is None or (keep == 1 and self.precision is None):
            return cache.fork()
        plan = self.plan(cache, keep, budget, bytes) if plan is None else plan
        student = cache.fork()
        student.invalid += plan.invalid
        student.adapter = self.adapter
        if self.online is not None and not soft:
            student.schedule = self.online.schedule_eviction(cache, keep, budget, temperature)
        relax_to_plan(student, plan, temperature, soft, self.residual)
        return student
