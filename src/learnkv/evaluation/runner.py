"""One prefill per batch, then every policy and every budget on a fork of it."""

import itertools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from learnkv.evaluation.batches import Packing, halves, is_out_of_memory, name_of
from learnkv.evaluation.jobs import Job
from learnkv.evaluation.kept_entries import VIEW, viewed_prompts
from learnkv.evaluation.measured_jobs import measured_jobs, read
from learnkv.evaluation.processes import Processes
from learnkv.evaluation.provenance import digest_of
from learnkv.evaluation.results import Record
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.base import Family, Prompt
from learnkv.policy.policy import Policy


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
            skipped += _measure(model, family, prompts, pending, policies, store, progress, viewed, packing.answers)
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
    answers: int | None,
) -> Iterator[str]:
    """Measure a batch, in halves where it does not fit in memory; a line about every prompt that never does."""
    failed = _failed(model, family, prompts, jobs, policies, store, progress, viewed, answers)
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
        yield from _measure(model, family, part, pending, policies, store, progress, viewed, answers)


def _failed(
    model: Any,
    family: Family,
    prompts: list[Prompt],
    jobs: Sequence[Job],
    policies: Sequence[Policy],
    store: Store,
    progress: Any,
    viewed: Collection[str],
    answers: int | None,
) -> str | None:
    """Measure a batch; None, or what did not fit in memory. Nothing of the batch is alive afterwards."""
    rest = list(jobs)
    progress.set_description(f"prefill of {len(prompts)} prompts, {prompts[0].setting}")
    try:
        prefilled = read(model, prompts, policies)
        for job, sizes, scores in measured_jobs(model, family, prompts, jobs, prefilled, viewed, answers):
            store.add([_record(job, *row) for row in zip(prompts, sizes, scores, strict=True)])
            rest = rest[1:]
            progress.set_description(f"{prompts[0].setting} {job.name} {job.budget}")
            progress.update()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return "prefill" if len(rest) == len(jobs) else f"{rest[0].name} {rest[0].budget}"
    return None


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
