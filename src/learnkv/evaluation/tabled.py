"""The samples that a folder's table shows: those of this command and of earlier ones under the same conditions."""

import sys
from collections.abc import Sequence

from learnkv.evaluation.jobs import Job
from learnkv.evaluation.results import FULL, Record, prompt_key
from learnkv.evaluation.runner import finished
from learnkv.evaluation.store import Store, slot_of
from learnkv.evaluation.tasks.base import Family


def tabled(families: Sequence[Family], jobs: Sequence[Job], store: Store) -> list[Record]:
    """Records of the prompts that every job has finished, then those of earlier commands.

    Of a task, length and setting that this command measures, only its finished prompts count, for all policies. Earlier
    samples count where model, versions, code and prompt are those of the full cache's sample beside them.
    """
    current = finished(families, jobs, store)
    measured = {prompt_key(record)[:4] for record in current}
    prompts = {prompt_key(record) for record in current}
    slots = {tuple(job.slot(prompt).values()) for job in jobs for family in families for prompt in family.prompts}
    taken = {record["fingerprint"] for record in current}
    stored = (record for record in store.records.values() if record["fingerprint"] not in taken)
    earlier = [record for record in stored if slot_of(record) not in slots]
    same = [record for record in earlier if record.get("conditions_digest") == jobs[0].conditions]
    if len(same) < len(earlier):
        count = f"{store.path.parent}: {len(earlier) - len(same)} samples"
        print(
            f"{count} of another model, or other versions of code or libraries, are not in the table", file=sys.stderr
        )
    counted = [r for r in same if prompt_key(r) in prompts or prompt_key(r)[:4] not in measured]
    full = {prompt_key(r): r["prompt_digest"] for r in (*current, *counted) if r["policy"] == FULL}
    return [*current, *(r for r in counted if full.get(prompt_key(r)) == r["prompt_digest"])]
