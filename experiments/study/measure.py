"""The comparisons of a study, each with a folder of samples that it continues."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.study import conditioning
from experiments.study.config import StudyConfig, name_of
from experiments.study.scores import Scores, best_of
from experiments.study.variants import trained
from learnkv.data.haystack import held_out_docstrings
from learnkv.data.ruler import NEEDLES
from learnkv.errors import UserError
from learnkv.evaluation import runner, tasks
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import Record
from learnkv.evaluation.run import load_policies
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.ruler import tasks_named
from learnkv.formats.files import write_text
from learnkv.inference.attention import attach
from learnkv.inference.models import context_length, load_model
from learnkv.policy.policy import Policy

MAIN, TEXT, SHUFFLED = "main", "text", "shuffled"
OUT_OF_DOMAIN: dict[str, dict[str, Any]] = {
    "haystack": {},
    "memo": {"template": "memo"},
    "german": {"keys": "german"},
    "greek": {"keys": "greek"},
}
"""Comparisons on needles that are not those of the main one, by name, and what is different."""


def differing(name: str, tasks: Iterable[str]) -> tuple[str, ...]:
    """Those of RULER's tasks in which a comparison of `OUT_OF_DOMAIN` differs from the main one."""
    needles = {task: NEEDLES[task] for task in tasks if task in NEEDLES}
    if name == "haystack":
        return tuple(task for task, needle in needles.items() if needle.haystack == "essay")
    return tuple(task for task, needle in needles.items() if name == "memo" or needle.key_kind == "words")


class Comparisons:
    """Measures what is missing, one model and its policies for all comparisons.

    `variants` are the learned policies, and those other methods that they start from.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.model, self.tokenizer = load_model(config.model, None, config.dtype, config.device)
        attach(self.model)
        self.context = context_length(self.model)
        self.learned = self._load(trained(config).values())
        self.baselines = self._load(config.methods)
        self.policy = name_of(config.learned)
        for earlier in config.records:
            if not (Path(earlier) / "samples.jsonl").is_file():
                raise UserError(f"records={earlier}: expected a folder of eval.py, found no samples in it")
        self.earlier = [record for earlier in config.records for record in samples(Path(earlier))]
        below = runner.baselines_of({**self.learned, **self.baselines})
        starts = {
            below[name]: self.baselines[below[name]] for name in self.learned if below.get(name) in self.baselines
        }
        self.variants = {**starts, **self.learned}

    def run(self) -> None:
        """Every comparison, the ones that others build on first."""
        config, count = self.config, self.config.samples
        if config.tasks:
            self.measure(MAIN, self.baselines, config.comparison(samples=count.baselines))
            self.measure(MAIN, self.variants, config.comparison(samples=count.ablations))
            chosen = {self.policy: self.learned[self.policy], **{name: self.baselines[name] for name in self.best()}}
            self.measure(MAIN, chosen, config.comparison(samples=count.evaluated))
            self._out_of_domain(chosen)
            self._conditioning()
        source = config.text or str(self.held_out("text.jsonl"))
        keys = config.comparison(tasks=("text",), text=source, samples=count.text, setting=("query_agnostic",))
        self.measure(TEXT, {**self.baselines, **self.learned}, keys)

    def best(self) -> list[str]:
        """The other methods that are measured as often as the policy under study."""
        records = samples(self.config.folder / MAIN)
        of_setting = [
            Scores((one for one in records if one["setting"] == setting), self.config.min_full_score)
            for setting in self.config.setting
        ]
        return best_of(of_setting, self.config.best)

    def _out_of_domain(self, chosen: Mapping[str, Policy]) -> None:
        config = self.config
        extra = {name_of(one): self.learned[name_of(one)] for one in (config.unseen,) if one is not None}
        policies = {**chosen, **extra}
        about: dict[str, Any] = {"samples": config.samples.out_of_domain, "setting": ("query_agnostic",)}
        for name, different in OUT_OF_DOMAIN.items():
            if name == "haystack":
                different = {"haystack": config.haystack or str(self.held_out("haystack.txt"))}
            if of := differing(name, tasks_named(config.tasks, ())):
                self.measure(name, policies, config.comparison(**about, **different, tasks=of))
        shorter = {name_of(one): self.learned[name_of(one)] for one in (config.shorter,) if one is not None}
        for length in config.longer:
            keys = config.comparison(**about, lengths=(length,))
            self.measure(f"length-{length}", {**policies, **shorter}, keys)

    def _conditioning(self) -> None:
        """The policies whose budgets depend on the prompt, with features of one prompt of each task in turn."""
        config = self.config
        agnostic: dict[str, Any] = {"setting": ("query_agnostic",)}
        learned = {name: self.learned[name] for name in map(name_of, (config.learned, *config.ablations))}
        own = {name: policy for name, policy in learned.items() if conditioning.conditioned(policy)}
        if not own:
            return
        self.earlier += samples(config.folder / MAIN)  # the full cache's
        families = tasks.load(config.comparison(samples=2, **agnostic), self.tokenizer, self.context)
        prompts = [prompt for family in families for prompt in family.prompts]
        each = [family.prompts[0] for family in families]
        strange = {
            f"{name}-shuffled": conditioning.shuffled(policy, conditioning.features_of(self.model, policy, each))
            for name, policy in own.items()
        }
        self.measure(SHUFFLED, strange, config.comparison(samples=config.samples.ablations, **agnostic))
        found = {name: conditioning.changes(self.model, policy, prompts, config.keep) for name, policy in own.items()}
        write_text(config.folder / SHUFFLED / "changed.json", json.dumps(found, indent=1) + "\n")

    def measure(self, name: str, policies: Mapping[str, Policy], keys: EvalConfig) -> None:
        """What is missing of one comparison; `name` is its folder's."""
        folder = self.config.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        families = tasks.load(keys, self.tokenizer, self.context)
        jobs = jobs_of(self.model, policies, keys.budgets)
        store = Store(folder / "samples.jsonl")
        wanted = {job.fingerprint(prompt) for family in families for prompt in family.prompts for job in jobs}
        taken = [one for one in self.earlier if one["fingerprint"] in wanted and one["fingerprint"] not in store]
        if taken:
            store.add([dict(one) for one in {one["fingerprint"]: one for one in taken}.values()])
        missing = sum(one not in store for one in wanted)
        print(f"{name}: {len(wanted):,} samples, {len(taken):,} taken over, {missing:,} to measure", file=sys.stderr)
        runner.run(self.model, families, jobs, store, Packing(keys.batch_size, answers=keys.answers))

    def _load(self, paths: Iterable[str]) -> dict[str, Policy]:
        return load_policies(self.config.comparison(ckpt=tuple(paths), tasks=("text",)), self.model)

    def held_out(self, file: str) -> Path:
        """Text of every Python that nothing is trained on, as a file."""
        path, texts = self.config.folder / file, held_out_docstrings()
        lines = [json.dumps({"text": text}) for text in texts] if path.suffix == ".jsonl" else texts
        write_text(path, "\n".join(lines) + "\n")
        return path


def samples(folder: Path) -> list[Record]:
    """Every finished sample of a comparison."""
    return list(Store(folder / "samples.jsonl").records.values())
