"""Means, shares and paired differences of a study, against numpy by hand."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.samples import record

from experiments.study.scores import Scores, best_of

FULL = {"vt": [100, 100, 50, 100], "niah": [100, 80, 100, 90], "hard": [100, 0, 0, 50]}
OURS = {"vt": [100, 50, 50, 100], "niah": [90, 80, 70, 90], "hard": [0, 0, 0, 0]}
THEIRS = {"vt": [50, 50, 0], "niah": [90, 10, 70], "hard": [100, 100, 100]}


def records() -> Iterator[dict[str, Any]]:
    for name, keep, scores in (("full", 1.0, FULL), ("learned", 0.1, OURS), ("kvzip", 0.1, THEIRS)):
        for task, each in scores.items():
            for index, score in enumerate(each):
                yield record(name, task, index, float(score), keep)


def test_tasks_that_the_full_cache_cannot_do_are_left_out() -> None:
    scores = Scores(records(), min_full_score=80)
    assert scores.tasks == ["vt", "niah"]
    assert scores.left_out == {"hard": 37.5}
    assert not any(one["task"] == "hard" for one in scores.records)
    assert Scores(records(), min_full_score=90).tasks == ["niah"]


def test_means_shares_and_their_errors() -> None:
    scores = Scores(records(), min_full_score=80)
    own = scores.of("learned", 0.1)
    spread = [float(np.std(OURS[task], ddof=1)) / 2 for task in ("vt", "niah")]
    assert own.mean == pytest.approx((np.mean(OURS["vt"]) + np.mean(OURS["niah"])) / 2)
    assert own.stderr == pytest.approx(np.hypot(spread[0], spread[1]) / 2)
    whole = (np.mean(FULL["vt"]) + np.mean(FULL["niah"])) / 2
    assert scores.retained("learned", 0.1).mean == pytest.approx(100 * own.mean / whole)
    assert scores.retained("learned", 0.1).stderr == pytest.approx(100 * own.stderr / whole)
    theirs = (np.mean(FULL["vt"][:3]) + np.mean(FULL["niah"][:3])) / 2  # of the prompts that they have
    assert scores.full_of("kvzip", 0.1).mean == pytest.approx(theirs)


def test_differences_are_paired_by_prompt() -> None:
    apart = Scores(records(), min_full_score=80).minus("learned", "kvzip", 0.1)
    by_task = [np.subtract(OURS[task][:3], THEIRS[task]) for task in ("vt", "niah")]
    assert apart.n == 6
    assert apart.mean == pytest.approx(np.mean([one.mean() for one in by_task]))
    assert apart.stderr == pytest.approx(np.sqrt(sum(one.var(ddof=1) / 3 for one in by_task)) / 2)


def test_the_nearest_rival_is_not_one_that_holds_more_than_was_asked() -> None:
    found = [*records(), *(record("quest", "vt", index, 100.0, spent=1.0) for index in range(4))]
    found += [record("snapkv", "vt", index, 90.0) for index in range(4)]
    scores = Scores(found, min_full_score=80)
    assert scores.rivals(0.1) == ["snapkv", "kvzip"]
    rival, apart = scores.nearest("learned", 0.1)
    assert rival == "snapkv"
    assert apart.mean == pytest.approx(75 - 90)
    scores = Scores(found, min_full_score=80, trained=("snapkv",))
    assert (scores.others(0.1), scores.rivals(0.1)) == (["snapkv", "kvzip"], ["kvzip"])
    assert scores.nearest("learned", 0.1)[0] == "kvzip"
    assert scores.nearest("learned", 0.1, trained=True)[0] == "snapkv"


def test_of_text_less_is_better() -> None:
    kl: dict[str, list[float]] = {"full": [0, 0], "learned": [0.1, 0.3], "kvzip": [0.5, 0.7], "snapkv": [0.4, 0.5]}
    found = [
        record(name, "text", index, 50.0, 1.0 if name == "full" else 0.25, kl=one)
        for name, each in kl.items()
        for index, one in enumerate(each)
    ]
    text = Scores(found, min_full_score=80, value="kl")
    assert text.rivals(0.25) == ["snapkv", "kvzip"]
    assert text.ratio("learned", "snapkv", 0.25) == pytest.approx(0.4 / 0.9)
    assert text.nearest("learned", 0.25)[0] == "snapkv"


def test_the_best_are_best_on_average_over_settings_and_fractions() -> None:
    def in_setting(setting: str, **scores: dict[float, float]) -> Scores:
        found = [record("full", "vt", 0, 100.0, 1.0, setting)]
        for name, of_keep in scores.items():
            found += [record(name, "vt", 0, score, keep, setting) for keep, score in of_keep.items()]
        return Scores(found, min_full_score=80)

    agnostic = in_setting("query_agnostic", a={0.5: 90.0, 0.1: 10.0}, b={0.5: 60.0, 0.1: 50.0}, learned={0.5: 99.0})
    aware = in_setting("query_aware", a={0.5: 100.0, 0.1: 10.0}, b={0.5: 60.0, 0.1: 50.0}, c={0.5: 100.0})
    assert best_of([agnostic, aware], 5) == ["b", "a"]  # 55 and 52.5; c was not measured everywhere
    assert best_of([agnostic, aware], 1) == ["b"]
