"""One prefill per batch, then every policy and every budget on a fork of it."""

import hashlib
import itertools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.evaluation.accepted import accepted_lengths
from learnkv.evaluation.batches import Packing, halves, is_out_of_memory, name_of
from learnkv.evaluation.budget import WHOLE, Budget
from learnkv.evaluation.cost import Cost, cost_per_prompt, measured, now
from learnkv.evaluation.kept_entries import VIEW, kept_view, prompt_view, viewed_prompts
from learnkv.evaluation.keys import policy_digest
from learnkv.evaluation.processes import Processes
from learnkv.evaluation.provenance import digest_of
from learnkv.evaluation.results import FULL, Record
from learnkv.evaluation.sharing import for_one_prompt
from learnkv.evaluation.sizes import full_sizes, release_captured, sizes_of
from learnkv.evaluation.sources import rooms_digest
from learnkv.evaluation.store import SLOT, Store
from learnkv.evaluation.tasks.base import Family, Prompt, pad
from learnkv.inference.digest import model_digest
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy


@dataclass(frozen=True)
class Job:
    """A policy at a budget; without a policy, the full cache."""

    name: str
    policy: Policy | None
    budget: Budget
    digest: str
    """Hash of the conditions, the policy with its weights, and the budget."""
    conditions: str = ""
    """Hash of the model, the libraries' versions and the package's code: what all samples of a table share."""
    draft_tokens: int = 0
    """Tokens per round of lossless decoding; 0: its accepted length is not measured."""

    def fingerprint(self, prompt: Prompt) -> str:
        """Hash of everything that determines the record of this job on a prompt."""
        return hashlib.sha256(f"{self.digest}{prompt.digest}".encode()).hexdigest()[:20]

    def slot(self, prompt: Prompt) -> dict[str, Any]:
        """The keys `SLOT` of a record of this job on a prompt."""
        about = (self.name, prompt.metric, prompt.task, prompt.length, prompt.setting, prompt.index)
        budget = (self.budget.keep, self.budget.tokens, self.budget.bytes)
        return dict(zip(SLOT, (*about, *budget), strict=True))


def jobs_of(model: Any, policies: Mapping[str, Policy], budgets: Sequence[Budget], draft_tokens: int = 0) -> list[Job]:
    """The full cache, then every policy at every budget; one that evicts nothing is measured once, at keep=1.

    Args:
        draft_tokens: per round of lossless decoding; 0: its accepted length is not measured.
    """
    conditions = hashlib.sha256(f"{model_digest(model)}{rooms_digest()}".encode()).hexdigest()[:20]
    jobs = [Job(FULL, None, WHOLE, f"{conditions}{FULL}", conditions)]
    for name, policy in policies.items():
        digest = policy_digest(policy)
        own = [WHOLE] if policy.scorer is None and policy.pages is None else budgets
        drafting = f"draft {draft_tokens}" if draft_tokens else ""
        digests = {budget: f"{conditions}{digest}{budget!r}{drafting}" for budget in own}
        jobs += [Job(name, policy, budget, digests[budget], conditions, draft_tokens) for budget in own]
    return jobs


def baselines_of(policies: Mapping[str, Policy]) -> dict[str, str]:
    """For each learned policy, the name of the heuristic that it starts from, if that is among the policies."""
    baselines = {}
    for name, policy in policies.items():
        base = policy.base_policy().spec()
        for other, heuristic in policies.items():
            if other != name and heuristic.spec() == base:
                baselines[name] = other
    return baselines


def run(
    model: Any,
    families: Sequence[Family],
    jobs: Sequence[Job],
    store: Store,
    packing: Packing,
    group: Processes | None = None,
    viewer: int = 0,
) -> list[str]:
    """Measure every job on every prompt that `store` lacks; finished batches are stored at once.

    Args:
        group: the processes that share out the batches; None: this one alone.
        viewer: prompts of which records also hold what every head kept; stored records without it are measured again.

    Returns:
        A line about every prompt that did not fit in memory, on the first process.
    """
    group = Processes() if group is None else group
    known = ((j.fingerprint(p), tuple(j.slot(p).values())) for f in families for p in f.prompts for j in jobs)
    group.after_first(lambda: store.forget_outdated(known))
    store.read()
    viewed = viewed_prompts((prompt for family in families for prompt in family.prompts), viewer)
    batches = [(family, *batch) for family in families for batch in _unfinished(family, jobs, store, packing, viewed)]
    group.meet()  # whoever measures before others have listed what is missing would shorten their lists
    policies = [job.policy for job in jobs if job.policy is not None]
    counts = list(itertools.accumulate((len(jobs) for _, jobs, _ in batches), initial=0))
    skipped: list[str] = []
    with tqdm(total=counts[-1], unit="run", dynamic_ncols=True, disable=not group.is_first) as progress:
        for number in group.shared(len(batches)):
            progress.update(counts[number] - progress.n)  # what other processes took
            family, pending, prompts = batches[number]
            skipped += _measure(model, family, prompts, pending, policies, store, progress, viewed)
        progress.update(counts[-1] - progress.n)
    return group.finish(skipped)


def _measure(
    model: Any,
    family: Family,
    prompts: list[Prompt],
    jobs: Sequence[Job],
    policies: Sequence[Policy],
    store: Store,
    progress: Any,
    viewed: Collection[str],
) -> Iterator[str]:
    """Measure a batch, in halves where it does not fit in memory; a line about every prompt that never does."""
    failed = _failed(model, family, prompts, jobs, policies, store, progress, viewed)
    if failed is None:
        return
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    if len(prompts) == 1:
        line = f"{name_of(prompts[0])} did not fit in memory ({failed}) and is in no policy's row"
        progress.write(f"warning: {line}", file=sys.stderr)
        yield line
        return
    for part in halves(prompts):
        pending = [job for job in jobs if _lacks(store, job, part[0], viewed)]
        yield from _measure(model, family, part, pending, policies, store, progress, viewed)


def _failed(
    model: Any,
    family: Family,
    prompts: list[Prompt],
    jobs: Sequence[Job],
    policies: Sequence[Policy],
    store: Store,
    progress: Any,
    viewed: Collection[str],
) -> str | None:
    """Measure a batch; None, or what did not fit in memory. Nothing of the batch is alive afterwards."""
    rest = list(jobs)
    progress.set_description(f"prefill of {len(prompts)} prompts, {prompts[0].setting}")
    try:
        prefilled = _read(model, prompts, policies)
        for job, sizes, scores in _measured(model, family, prompts, jobs, prefilled, viewed):
            store.add([_record(job, *row) for row in zip(prompts, sizes, scores, strict=True)])
            rest = rest[1:]
            progress.set_description(f"{prompts[0].setting} {job.name} {job.budget}")
            progress.update()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return "prefill" if len(rest) == len(jobs) else f"{rest[0].name} {rest[0].budget}"
    return None


class _Prefilled(NamedTuple):
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


def _read(model: Any, prompts: Sequence[Prompt], policies: Sequence[Policy]) -> _Prefilled:
    """One prefill of a batch."""
    ids, mask = pad([prompt.prefill_ids for prompt in prompts], "left", model.device)
    passes: list[float] = []  # when each pass of the model ended
    hook = model.register_forward_hook(lambda *_: passes.append(now(model.device)))
    try:
        with measured(model.device) as cost:
            cache = prefill(model, ids, mask, window=0, policies=policies)
    finally:
        hook.remove()
    return _Prefilled(cache, cost, passes[-1] - passes[0] if cache.extra_pass_tokens else 0.0)


def _measured(
    model: Any,
    family: Family,
    prompts: list[Prompt],
    jobs: Sequence[Job],
    prefilled: _Prefilled,
    viewed: Collection[str],
) -> Iterator[tuple[Job, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Each job with the sizes, costs and scores of the prompts that were read, on forks of their cache."""
    cache, full, decode = prefilled.cache, None, Cost()
    rows = [row for row, prompt in enumerate(prompts) if prompt.digest in viewed]
    if jobs[0].policy is None or family.needs_full:
        with measured(model.device) as decode:
            scores, full = family.measure(model, prompts, cache.fork(), None)
    for _, same_policy in itertools.groupby(jobs, key=lambda job: job.name):
        group = list(same_policy)
        policy = None if group[0].policy is None else for_one_prompt(group[0].policy)
        seconds = prefilled.seconds_for(group[0].policy)
        for job in group:
            sizes, compress = full_sizes(cache), Cost()
            views = [prompt_view(family.tokenizer, prompts[row]) for row in rows]
            if policy is not None:
                with measured(model.device) as compress:
                    fork = _compressed(policy, cache, job)
                seconds += compress.seconds if job is group[0] else 0.0  # later budgets share its scores
                release_captured(fork)
                sizes = sizes_of(fork, policy, job.budget)
                views = [kept_view(fork, row) for row in rows]
                if job.draft_tokens:
                    lengths = accepted_lengths(model, prompts, cache, fork, job.draft_tokens)
                    sizes = [{**size, **accepted} for size, accepted in zip(sizes, lengths, strict=True)]
                with measured(model.device) as decode:
                    scores, _ = family.measure(model, prompts, fork, full)
                if policy.pages is not None:  # some choose how much they read, token by token
                    sizes = [{**size, "read": read} for size, read in zip(sizes, fork.read, strict=True)]
            for row, view in zip(rows, views, strict=True):
                sizes[row][VIEW] = view
            cost = cost_per_prompt(len(prompts), seconds, decode, (prefilled.cost, compress, decode))
            yield job, [{**size, **cost} for size in sizes], scores


def _compressed(policy: Policy, cache: CompressedCache, job: Job) -> CompressedCache:
    """A compressed fork of a cache; an error names the policy, one of many."""
    try:
        return policy.compress(cache.fork(), keep=job.budget.keep, budget=job.budget.tokens, bytes=job.budget.bytes)
    except UserError as error:
        raise UserError(f"{job.name}: {error}") from None


def finished(families: Sequence[Family], jobs: Sequence[Job], store: Store) -> list[Record]:
    """Records of the prompts that every job has finished, in the order of the jobs."""
    done = [p for f in families for p in f.prompts if all(job.fingerprint(p) in store for job in jobs)]
    # A record may have been measured under another name or number of the same policy and prompt.
    return [{**store[job.fingerprint(prompt)], **job.slot(prompt)} for job in jobs for prompt in done]


def _lacks(store: Store, job: Job, prompt: Prompt, viewed: Collection[str]) -> bool:
    """Whether a job has to be measured on a prompt: there is no record, or none with a view where one is wanted."""
    fingerprint = job.fingerprint(prompt)
    return fingerprint not in store or (prompt.digest in viewed and VIEW not in store[fingerprint])


def _unfinished(
    family: Family, jobs: Sequence[Job], store: Store, packing: Packing, viewed: Collection[str]
) -> Iterator[tuple[list[Job], list[Prompt]]]:
    """Batches of prompts with the same unfinished jobs; a record of a viewed prompt needs its view."""
    groups: dict[tuple[int, ...], list[Prompt]] = {}
    for prompt in sorted(family.prompts, key=family.effort):
        pending = tuple(index for index, job in enumerate(jobs) if _lacks(store, job, prompt, viewed))
        if pending:
            groups.setdefault(pending, []).append(prompt)
    for pending, prompts in groups.items():
        for batch in packing.batches(prompts):
            yield [jobs[index] for index in pending], batch


def _record(job: Job, prompt: Prompt, sizes: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    full, budget = sizes["bytes_full"], job.budget
    asked = {"asked": budget.fraction(len(prompt.prefill_ids), full), "asked_bytes": budget.asked_bytes(full)}
    record = {**job.slot(prompt), **asked, **sizes, "haystack": prompt.haystack}
    expected, depth = (None, None) if prompt.sample is None else (prompt.sample.answers, prompt.sample.depth)
    digests = {"prompt_digest": prompt.digest[:20], "conditions_digest": job.conditions}
    task = {"task_version": prompt.version, "task_hash": digest_of(prompt.measurement), "n_original": prompt.n_original}
    task["prompt_hash"] = digest_of(prompt.text)
    return {
        **record,
        **scores,
        "prompt": prompt.shown,
        "cut_tokens": prompt.cut_tokens,
        "depth": depth,
        "expected": expected,
        **task,
        **digests,
        "fingerprint": job.fingerprint(prompt),
    }
