"""Samples of one listed comparison: KL and exactness of answers that are read, or scores of generated ones.

KL counts on every task of a comparison; the study's YAML names those that the model can do. Scores count on those of
them that the full cache itself can do at this length, exactly or by what it generates.
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
    """Percent of the prompts whose every answer token is ranked first; or scores of generated answers."""
    return Scores(records, config.min_full_score, trained=config.trained)


def best_by_kl(scores: Scores, count: int) -> list[str]:
    """The methods without training whose KL, averaged over the kept fractions, is least."""
    total: dict[str, list[float]] = {}
    for keep in scores.keeps:
        for rival in scores.rivals(keep):
            total.setdefault(rival, []).append(scores.of(rival, keep).mean)
    finished = [rival for rival, means in total.items() if len(means) == len(scores.keeps)]
    return sorted(finished, key=lambda rival: fmean(total[rival]))[:count]
