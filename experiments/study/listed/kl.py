"""Samples of one listed comparison: KL and exactness of answers that are read, or scores of generated ones.

Every task of a comparison by forced scores counts: the study's YAML names those that the full cache can do, by what it
generates. Of generated ones, those that it cannot do at this length are left out.
"""

from collections.abc import Iterable
from statistics import fmean

from experiments.study.config import StudyConfig
from experiments.study.scores import Scores
from learnkv.evaluation.results import Record


def kl_scores(records: Iterable[Record], config: StudyConfig) -> Scores:
    """KL from the full cache in nats per token, less is better."""
    return Scores(records, 0.0, "kl", config.trained)


def exact_scores(records: Iterable[Record], config: StudyConfig) -> Scores:
    """Percent of the prompts whose every answer token is ranked first."""
    return Scores(records, 0.0, trained=config.trained)


def generated_scores(records: Iterable[Record], config: StudyConfig) -> Scores:
    """Scores from 0 to 100 of the tasks that the full cache can do."""
    return Scores(records, config.min_full_score, trained=config.trained)


def best_by_kl(scores: Scores, count: int) -> list[str]:
    """The methods without training whose KL, averaged over the kept fractions, is least."""
    total: dict[str, list[float]] = {}
    for keep in scores.keeps:
        for rival in scores.rivals(keep):
            total.setdefault(rival, []).append(scores.of(rival, keep).mean)
    finished = [rival for rival, means in total.items() if len(means) == len(scores.keeps)]
    return sorted(finished, key=lambda rival: fmean(total[rival]))[:count]
