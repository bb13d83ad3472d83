"""Everything that a study has measured, as criteria and page read it."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.study.config import StudyConfig, name_of
from experiments.study.measure import MAIN, OUT_OF_DOMAIN, SHUFFLED, TEXT, samples
from experiments.study.scores import Scores
from experiments.study.variants import facts
from learnkv.evaluation.results import FULL, Record
from learnkv.persistence.policies import describe_policy_file


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    policy: str
    """Name of the policy under study."""
    settings: Mapping[str, Scores] = field(default_factory=dict)
    """The main comparison, by setting."""
    text: Scores | None = None
    """KL on held-out text."""
    out_of_domain: Mapping[str, Scores] = field(default_factory=dict)
    """Other lengths, templates, haystacks and keys, query-agnostic."""
    shuffled: Scores | None = None
    """The main comparison, query-agnostic, with policies that see the features of other prompts."""
    changed: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """By policy and kept fraction, for each prompt: what is kept that mean features would not keep."""
    single: Mapping[str, float] = field(default_factory=dict)
    """Policies trained for one kept fraction, and which."""
    unseen: str | None = None
    """A policy that never saw a retrieval task."""
    held_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Policies that never saw some families of tasks, and which."""
    runs: Mapping[str, Path] = field(default_factory=dict)
    """Folders of trainings."""


def gather(config: StudyConfig) -> Results:
    """What lies in a study's folder."""
    folder, main = config.folder, recorded(config, MAIN)
    measured: list[str] = [setting for setting in config.setting if _of(main, setting)]
    settings = {setting: _scores(main, config, setting) for setting in measured}
    shuffled = recorded(config, SHUFFLED)
    changed = folder / SHUFFLED / "changed.json"
    names = [*OUT_OF_DOMAIN, *(f"length-{length}" for length in config.longer)]
    out_of_domain = {name: records for name in names if (records := recorded(config, name))}
    text = recorded(config, TEXT)
    runs = {name: folder / "train" / name for name in map(name_of, config.variants)}
    runs = {name: run for name, run in runs.items() if (run / "config.yaml").is_file()}
    return Results(
        policy=name_of(config.learned),
        settings=settings,
        text=Scores(text, config.min_full_score, "kl", config.trained) if text else None,
        out_of_domain={name: _scores(records, config, "query_agnostic") for name, records in out_of_domain.items()},
        shuffled=_scores([*main, *shuffled], config, "query_agnostic") if shuffled else None,
        changed=json.loads(changed.read_text(encoding="utf-8")) if changed.is_file() else {},
        single={name: facts(runs[name])["keep"][0] for name in map(name_of, config.single) if name in runs},
        unseen=None if config.unseen is None else name_of(config.unseen),
        held_out={name: facts(runs[name])["hold_out"] for name in map(name_of, config.held_out) if name in runs},
        runs=runs,
    )


def recorded(config: StudyConfig, name: str) -> list[Record]:
    """Samples of a comparison, without those of policies that are no longer in the study."""
    variants = list(map(name_of, config.variants))
    shuffled = (f"{variant}-shuffled" for variant in variants)
    policies = {FULL, *map(describe_policy_file, config.methods), *variants, *shuffled}
    return [record for record in samples(config.folder / name) if record["policy"] in policies]


def last_validation(run: Path) -> dict[str, float]:
    """What a training logged at its last validation."""
    file = run / "metrics.csv"
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as table:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(table)]
    return next((row for row in reversed(rows) if any(key.startswith("val/") for key in row)), {})


def _of(records: Sequence[Record], setting: str) -> list[Record]:
    return [record for record in records if record["setting"] == setting]


def _scores(records: Sequence[Record], config: StudyConfig, setting: str) -> Scores:
    unique: dict[Any, Record] = {record["fingerprint"]: record for record in _of(records, setting)}
    return Scores(unique.values(), config.min_full_score, trained=config.trained)
