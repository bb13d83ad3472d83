"""The comparisons that a study lists, in the order in which it lists them."""

from collections.abc import Mapping
from dataclasses import fields
from math import ceil
from pathlib import Path
from typing import Any

from experiments.study.comparison import Comparison, Whom
from experiments.study.config import StudyConfig, name_of
from experiments.study.listed.archive import file_of, read_archive
from experiments.study.listed.kl import best_by_kl, kl_scores
from experiments.study.measure import Comparisons, samples
from learnkv.data.haystack import essay
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.precisions import at_precision, at_precisions
from learnkv.evaluation.results import FULL
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

_OWN = frozenset({"policies", "best", "chosen_in", "precision", "keep"})
"""Keys of a comparison that are not those of eval."""
DOCSTRINGS = "docstrings"


def measure_listed(study: Comparisons) -> None:
    """Every comparison; what earlier runs have measured is kept, those in the study's results too."""
    earlier = read_archive(Path(study.config.out) / file_of(study.config.name))
    for name, comparison in study.config.comparisons.items():
        if study.config.only and name not in study.config.only:
            continue
        study.earlier = earlier.get(name, [])
        study.measure(name, policies_of(study, comparison), keys_of(study, comparison))


def policies_of(study: Comparisons, comparison: Comparison) -> Mapping[str, Policy]:
    """The policies of a comparison by name, each once."""
    found = {FULL: load_policy(FULL).to(study.model.device)} if comparison.precision else {}
    found = at_precisions(found, comparison.precision)
    for whom in comparison.policies:
        found |= _group(study, comparison, whom)
    return found


def _group(study: Comparisons, comparison: Comparison, whom: Whom) -> Mapping[str, Policy]:
    """The policies that one word of a comparison names."""
    config = study.config
    if whom == "best":
        return {name: _named(study, name) for name in best(config, comparison)}
    if whom == "uniform":
        assert config.uniform is not None
        return at_precisions({name_of(config.uniform): study.learned[name_of(config.uniform)]}, comparison.precision)
    if whom == "baselines":
        untrained = {name: policy for name, policy in study.baselines.items() if name not in config.trained}
        if not comparison.precision:
            return study.baselines
        others = {name: policy for name, policy in study.baselines.items() if name not in untrained}
        return {**at_precisions(untrained, comparison.precision), **others}
    chosen = {"learned": (config.learned,), "unseen": (config.unseen,), "ablations": config.ablations}[whom]
    return {name_of(one): study.learned[name_of(one)] for one in chosen if one is not None}


def _named(study: Comparisons, name: str) -> Policy:
    """One of the other methods, at a precision as in `kvzip@4`."""
    method, _, precision = name.partition("@")
    return at_precision(study.baselines[method], precision) if precision else study.baselines[method]


def best(config: StudyConfig, comparison: Comparison) -> list[str]:
    """The other methods without training that lose least on the prompts that they are chosen by."""
    records = samples(config.folder / comparison.chosen_in)
    return best_by_kl(kl_scores(records, config), comparison.best)


def keys_of(study: Comparisons, comparison: Comparison) -> EvalConfig:
    """A comparison as the keys of eval."""
    keys: dict[str, Any] = {
        field.name: getattr(comparison, field.name) for field in fields(comparison) if field.name not in _OWN
    }
    keys["keep"] = comparison.keeps
    keys["samples"] = ceil(comparison.samples * study.config.portion)
    if "text" in comparison.tasks:
        keys["text"] = study.config.text or str(study.held_out("text.jsonl"))
    if comparison.haystack == DOCSTRINGS:
        keys["haystack"] = str(study.held_out("haystack.txt"))
        essay.cache_clear()  # the file was just written
    return study.config.comparison(**keys)
