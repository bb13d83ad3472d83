"""One prefill per batch, then every policy and every budget on a fork of it."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.evaluation.config import Budget
from learnkv.evaluation.results import FULL, Record
from learnkv.evaluation.sharing import for_one_prompt
from learnkv.evaluation.store import SLOT, Store
from learnkv.evaluation.tasks.base import Family, Prompt, pad
from learnkv.inference.models import model_digest
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy


@dataclass(frozen=True)
class Job:
    """A policy at a budget; without a policy, the full cache."""

    name: str
    policy: Policy | None
    budget: Budget
    digest: str
    """Of the model, the policy with its weights, and the budget."""

    def fingerprint(self, prompt: Prompt) -> str:
        """Of everything that determines what this job makes of a prompt."""
        return hashlib.sha256(f"{self.digest}{prompt.digest}".encode()).hexdigest()[:20]

    def slot(self, prompt: Prompt) -> dict[str, Any]:
        """What a record of this job on a prompt is about."""
        about = (self.name, prompt.task, prompt.length, prompt.setting, prompt.index)
        return dict(zip(SLOT, (*about, self.budget.keep, self.budget.tokens), strict=True))


def jobs_of(model: Any, policies: Mapping[str, Policy], budgets: Sequence[Budget]) -> list[Job]:
    """The full cache, then every policy at every budget."""
    base = model_digest(model)
    jobs = [Job(FULL, None, Budget(keep=1.0), f"{base}{FULL}")]
    for name, policy in policies.items():
        weights = b"".join(held.cpu().numpy().tobytes() for held in policy.state_dict().values())
        beside = policy.adapter.name.encode() if policy.adapter is not None else b""
        digest = hashlib.sha256(json.dumps(policy.spec(), sort_keys=True).encode() + weights + beside).hexdigest()
        jobs += [Job(name, policy, budget, f"{base}{digest}{budget}") for budget in budgets]
    return jobs


def starting_points(policies: Mapping[str, Policy]) -> dict[str, str]:
    """For each policy with learned parts, the name of the heuristic below them, if that one is compared too."""
    found = {}
    for name, policy in policies.items():
        plain = policy.base_policy().spec()
        for other, heuristic in policies.items():
            if other != name and heuristic.spec() == plain:
                found[name] = other
    return found


def run(model: Any, families: Sequence[Family], jobs: Sequence[Job], store: Store, batch_size: int) -> None:
    """Let every job measure every prompt that `store` does not hold yet; finished batches are stored at once."""
    store.forget_outdated(
        (j.fingerprint(p), tuple(j.slot(p).values())) for f in families for p in f.prompts for j in jobs
    )
    batches = [(family, *batch) for family in families for batch in _unfinished(family, jobs, store, batch_size)]
    policies = [job.policy for job in jobs if job.policy is not None]
    with tqdm(total=sum(len(jobs) for _, jobs, _ in batches), unit="run", dynamic_ncols=True) as progress:
        for family, todo, prompts in batches:
            ids, mask = pad([prompt.read for prompt in prompts], "left", model.device)
            progress.set_description(f"reading {len(prompts)} prompts of {prompts[0].setting}")
            cache = prefill(model, ids, mask, window=0, policies=policies)
            full: Any = None
            if todo[0].policy is None or family.needs_full:
                measured, full = family.measure(model, prompts, cache.fork(), None)
            for _, same in itertools.groupby(todo, key=lambda job: job.name):
                budgets = list(same)
                policy = None if budgets[0].policy is None else for_one_prompt(budgets[0].policy)
                for job in budgets:
                    progress.set_description(f"{prompts[0].setting} {job.name} {job.budget}")
                    held = _full(cache)
                    if policy is not None:
                        fork = policy.compress(cache.fork(), keep=job.budget.keep, budget=job.budget.tokens)
                        _forget_recorded(fork)
                        held = _held(fork, policy)
                        measured, _ = family.measure(model, prompts, fork, full)
                    store.add([_record(job, *row) for row in zip(prompts, held, measured, strict=True)])
                    progress.update()


def finished(families: Sequence[Family], jobs: Sequence[Job], store: Store) -> list[Record]:
    """The records of all prompts that every job has finished, jobs outermost."""
    done = [p for f in families for p in f.prompts if all(job.fingerprint(p) in store for job in jobs)]
    return [store[job.fingerprint(prompt)] for job in jobs for prompt in done]


def _unfinished(
    family: Family, jobs: Sequence[Job], store: Store, size: int
) -> Iterator[tuple[list[Job], list[Prompt]]]:
    """Batches of prompts for which the same jobs are still to be done."""
    groups: dict[tuple[int, ...], list[Prompt]] = {}
    for prompt in sorted(family.prompts, key=family.effort):
        todo = tuple(at for at, job in enumerate(jobs) if job.fingerprint(prompt) not in store)
        if todo:
            groups.setdefault(todo, []).append(prompt)
    for todo, prompts in groups.items():
        for begin in range(0, len(prompts), size):
            yield [jobs[at] for at in todo], prompts[begin : begin + size]


def _full(cache: CompressedCache) -> list[dict[str, Any]]:
    """What each row of the full cache holds, padding not counted."""
    tokens = sum(cache.prompt_lengths)
    each = [cache.full_nbytes * n / tokens for n in cache.prompt_lengths]
    return [{"spent": 1.0, "read": 1.0, "prefills": 1.0, "bytes": size, "bytes_full": size} for size in each]


def _forget_recorded(cache: CompressedCache) -> None:
    """What scorers of other policies read is none of what this one holds; where it evicts, that is gone already."""
    for layer in cache.compressed_layers():
        if layer.decode_capture is None:
            layer.capture.forget()


def _held(cache: CompressedCache, policy: Policy) -> list[dict[str, Any]]:
    """What each row retains, and how often it was read for that; a batch's bytes belong to its rows in proportion to
    what they kept."""
    with_budgets = any(True for _ in policy.parameters())
    again = [
        sum(cache.extra_pass_tokens[one][at] for one in policy.capture_spec.extra_passes)
        for at in range(len(cache.prompt_lengths))
    ]
    rows, kept = _full(cache), [share * n for share, n in zip(cache.spent, cache.prompt_lengths, strict=True)]
    for at, row in enumerate(rows):
        row["spent"], row["read"] = cache.spent[at], cache.read[at]
        row["prefills"] = 1 + again[at] / cache.prompt_lengths[at]
        row["bytes"] = cache.nbytes * kept[at] / sum(kept)
        if with_budgets and cache.budgets is not None:
            row["budgets"] = (cache.budgets[:, at] / cache.prompt_lengths[at]).tolist()
    return rows


def _record(job: Job, prompt: Prompt, held: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    record = {**job.slot(prompt), "asked": job.budget.asked(len(prompt.read)), **held, "haystack": prompt.haystack}
    return {**record, **measured, "fingerprint": job.fingerprint(prompt)}
