"""Every job on prompts that were read once: each compresses a fork of their cache, then answers are written."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.side_by_side import joinable, side_by_side
from learnkv.errors import UserError
from learnkv.evaluation.accepted import accepted_lengths
from learnkv.evaluation.cost import Cost, cost_per_prompt, measured, now
from learnkv.evaluation.jobs import Job
from learnkv.evaluation.kept_entries import VIEW, kept_view, prompt_view
from learnkv.evaluation.sharing import for_one_prompt
from learnkv.evaluation.sizes import full_sizes, release_captured, sizes_of
from learnkv.evaluation.tasks.base import Family, Prompt, pad
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy


class Prefilled(NamedTuple):
    """Prompts that were read for all policies."""

    cache: CompressedCache
    cost: Cost
    extra_seconds: float
    """Part of the seconds that extra passes over the prompts took."""

    def seconds_for(self, policy: Policy | None) -> float:
        """Seconds without the extra passes that `policy` does not need; passes are charged by their tokens."""
        own = frozenset() if policy is None else policy.capture_spec.extra_passes
        tokens = {extra: sum(rows) for extra, rows in self.cache.extra_pass_tokens.items()}
        share = sum(tokens[extra] for extra in own) / max(1, sum(tokens.values()))
        return self.cost.seconds - self.extra_seconds * (1 - share)


def read(model: Any, prompts: Sequence[Prompt], policies: Sequence[Policy]) -> Prefilled:
    """One prefill of a batch."""
    ids, mask = pad([prompt.prefill_ids for prompt in prompts], "left", model.device)
    passes: list[float] = []  # when each pass of the model ended
    hook = model.register_forward_hook(lambda *_: passes.append(now(model.device)))
    try:
        with measured(model.device) as cost:
            cache = prefill(model, ids, mask, window=0, policies=policies)
    finally:
        hook.remove()
    return Prefilled(cache, cost, passes[-1] - passes[0] if cache.extra_pass_tokens else 0.0)


def measured_jobs(
    model: Any,
    family: Family,
    prompts: list[Prompt],
    jobs: Sequence[Job],
    prefilled: Prefilled,
    viewed: Collection[str],
    answers: int | None = None,
) -> Iterator[tuple[Job, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Each job with the sizes, costs and scores of the prompts that were read, on forks of their cache.

    Args:
        answers: rows whose answers are written at once, policies side by side; None: one policy after the other.
    """
    batch = _Batch(model, family, prompts, prefilled)
    rows = [row for row, prompt in enumerate(prompts) if prompt.digest in viewed]
    if jobs[0].policy is None or family.needs_full:
        with measured(model.device) as decode:
            scores, batch.full = family.measure(model, prompts, prefilled.cache.fork(), None)
    for _, same_policy in itertools.groupby(jobs, key=lambda job: job.name):
        group = list(same_policy)
        if group[0].policy is None:
            sizes, seconds = full_sizes(prefilled.cache), prefilled.seconds_for(None)
            _add_views(sizes, {row: prompt_view(family.tokenizer, prompts[row]) for row in rows})
            cost = cost_per_prompt(len(prompts), seconds, decode, (prefilled.cost, decode))
            yield group[0], [{**size, **cost} for size in sizes], scores
            continue
        policy = for_one_prompt(group[0].policy)
        seconds = prefilled.seconds_for(group[0].policy)
        for job in group:
            with measured(model.device) as compress:
                fork = _compressed(policy, prefilled.cache, job)
            seconds += compress.seconds if job is group[0] else 0.0  # later budgets share its scores
            release_captured(fork)
            sizes = sizes_of(fork, policy, job.budget)
            _add_views(sizes, {row: kept_view(fork, row) for row in rows})
            if job.draft_tokens:
                lengths = accepted_lengths(model, prompts, prefilled.cache, fork, job.draft_tokens)
                sizes = [{**size, **accepted} for size, accepted in zip(sizes, lengths, strict=True)]
            alike = joinable(fork) if answers is not None and not family.needs_full else None
            full = (len(batch.waiting) + 1) * len(prompts) > (answers or 0)
            if full or alike is None or any(other.alike != alike for other in batch.waiting):
                yield from batch.answered()
            batch.waiting.append(_Waiting(job, fork, sizes, seconds, compress, alike))
            if alike is None:
                yield from batch.answered()
    yield from batch.answered()


class _Waiting(NamedTuple):
    """Compressed prompts of a job whose answers are yet to be written."""

    job: Job
    cache: CompressedCache
    sizes: list[dict[str, Any]]
    seconds: float
    """To read, score and evict."""
    compress: Cost
    alike: tuple[str, ...] | None
    """What those have in common whose answers are written at once; None: it is alone."""


class _Batch:
    """A batch that was read: jobs wait until the answers of several are written at once."""

    def __init__(self, model: Any, family: Family, prompts: list[Prompt], prefilled: Prefilled) -> None:
        self.model, self.family, self.prompts, self.prefilled = model, family, prompts, prefilled
        self.full: Any = None
        self.waiting: list[_Waiting] = []

    def answered(self) -> Iterator[tuple[Job, list[dict[str, Any]], list[dict[str, Any]]]]:
        """The jobs that wait, in order; how long the answers of one took is known where it is alone."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        count, alone = len(self.prompts), len(waiting) == 1
        cache = waiting[0].cache if alone else side_by_side([job.cache for job in waiting])
        with measured(self.model.device) as decode:
            scores, _ = self.family.measure(self.model, self.prompts * len(waiting), cache, self.full)
        for number, (job, fork, sizes, seconds, compress, _) in enumerate(waiting):
            if alone and job.policy is not None and job.policy.pages is not None:
                # Some choose how much they read, token by token.
                sizes = [{**size, "read": read} for size, read in zip(sizes, fork.read, strict=True)]
            parts = (self.prefilled.cost, compress, decode)
            cost = cost_per_prompt(count, seconds, decode if alone else None, parts)
            yield job, [{**size, **cost} for size in sizes], scores[number * count : (number + 1) * count]


def _add_views(sizes: list[dict[str, Any]], views: Mapping[int, Any]) -> None:
    for row, view in views.items():
        sizes[row][VIEW] = view


def _compressed(policy: Policy, cache: CompressedCache, job: Job) -> CompressedCache:
    """A compressed fork of a cache; an error names the policy, one of many."""
    try:
        return policy.compress(cache.fork(), keep=job.budget.keep, budget=job.budget.tokens, bytes=job.budget.bytes)
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from None
