"""The comparisons that a study lists, in the order in which it lists them."""

from collections.abc import Mapping
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any

from experiments.study.config import Comparison, StudyConfig, name_of
from experiments.study.listed.archive import read_archive
from experiments.study.listed.kl import best_by_kl, kl_scores
from experiments.study.measure import Comparisons, samples
from learnkv.data.haystack import essay
from learnkv.evaluation.config import EvalConfig
from learnkv.policy.policy import Policy

_OWN = frozenset({"policies", "best", "chosen_in"})
"""Keys of a comparison that are not those of eval."""
DOCSTRINGS = "docstrings"


def measure_listed(study: Comparisons) -> None:
    """Every comparison; what earlier runs have measured is kept, those in the study's results too."""
    earlier = read_archive(Path(study.config.out))
    for name, comparison in study.config.comparisons.items():
        if study.config.only and name not in study.config.only:
            continue
        study.earlier = earlier.get(name, [])
        study.measure(name, policies_of(study, comparison), keys_of(study, comparison))


def policies_of(study: Comparisons, comparison: Comparison) -> Mapping[str, Policy]:
    """The policies of a comparison by name, each once."""
    config, names = study.config, dict[str, None]()
    groups = {
        "learned": (name_of(config.learned),),
        "unseen": () if config.unseen is None else (name_of(config.unseen),),
        "ablations": tuple(map(name_of, config.ablations)),
        "baselines": tuple(study.baselines),
    }
    for whom in comparison.policies:
        names.update(dict.fromkeys(best(config, comparison) if whom == "best" else groups[whom]))
    every = {**study.learned, **study.baselines}
    return {name: every[name] for name in names}


def best(config: StudyConfig, comparison: Comparison) -> list[str]:
    """The other methods without training that lose least on the prompts that they are chosen by."""
    records = samples(config.folder / comparison.chosen_in)
    return best_by_kl(kl_scores(records, config), comparison.best)


def keys_of(study: Comparisons, comparison: Comparison) -> EvalConfig:
    """A comparison as the keys of eval."""
    keys: dict[str, Any] = {
        field.name: getattr(comparison, field.name) for field in fields(comparison) if field.name not in _OWN
    }
    keys["samples"] = ceil(comparison.samples * study.config.portion)
    if "text" in comparison.tasks:
        keys["text"] = study.config.text or str(study.held_out("text.jsonl"))
    if comparison.haystack == DOCSTRINGS:
        keys["haystack"] = str(study.held_out("haystack.txt"))
        essay.cache_clear()  # the file was just written
    return study.config.comparison(**keys)
