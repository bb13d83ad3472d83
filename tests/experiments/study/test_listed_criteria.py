"""Criteria of a study that lists its comparisons, on made-up samples that meet them and that miss them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.samples import record

from experiments.study.config import StudyConfig
from experiments.study.listed import criteria, pictures
from experiments.study.listed.criteria import Measured
from experiments.study.listed.kl import best_by_kl, kl_scores


def samples(
    metric: str = "forced", setting: str = "query_agnostic", keep: float = 0.1, **values: Any
) -> list[dict[str, Any]]:
    """Four prompts; of each policy its KL (forced) or score (generated), one for all prompts or one each."""
    found = []
    for name, numbers in {"full": 0.0 if metric == "forced" else 100.0, **values}.items():
        each = numbers if isinstance(numbers, list) else [numbers] * 4
        for at, value in enumerate(each):
            more = {"kl": value, "metric": metric} if metric == "forced" else {}
            score = 100.0 if metric == "forced" else value
            found.append(record(name, "vt", at, score, 1.0 if name == "full" else keep, setting, **more))
    return found


def measured(unseen: str | None = None, ablations: tuple[str, ...] = (), **records: list[dict[str, Any]]) -> Measured:
    return Measured(StudyConfig(unseen=unseen, ablations=ablations, baselines=("kvzip", "snapkv")), records)


@pytest.mark.parametrize(("own", "verdict"), [(0.074, "met"), (0.076, "missed")])
def test_kl_is_compared_with_the_best_method(own: float, verdict: str) -> None:
    about = measured(needles=samples(learned=own, kvzip=0.1, snapkv=2.0))
    (line,) = list(criteria.ratios(about, "needles", {0.1: 0.75}, "needles"))
    assert (line.verdict, line.measured.split()[2]) == (verdict, "kvzip")
    (line,) = criteria.ratios(about, "needles", {0.05: 0.35}, "needles")
    assert line.verdict == "not measured"


@pytest.mark.parametrize(
    ("own", "rival", "verdict"),
    [
        ([90.0, 80.0, 90.0, 80.0], 50.0, "met"),  # the rival is clearly below full, and beaten
        ([50.0, 60.0, 40.0, 60.0], 50.0, "missed"),  # not clearly above it
        ([100.0, 100.0, 100.0, 60.0], [100.0, 100.0, 100.0, 70.0], "met"),  # it is nearly full: not worse suffices
        (60.0, [100.0, 100.0, 100.0, 70.0], "missed"),
    ],
)
def test_generated_answers_beat_what_is_below_the_full_cache(own: Any, rival: Any, verdict: str) -> None:
    about = measured(generated=samples("generated", learned=own, kvzip=rival, snapkv=10.0))
    (line,) = criteria.beats_when_generating(about)
    assert line.verdict == verdict
    assert " over kvzip, " in line.measured


@pytest.mark.parametrize(("own", "verdict"), [([0.1, 0.2, 0.1, 0.2], "met"), ([0.2, 0.2, 0.2, 0.21], "missed")])
def test_query_aware_is_not_worse_than_any(own: list[float], verdict: str) -> None:
    about = measured(**{"query-aware": samples(setting="query_aware", learned=own, kvzip=0.14, snapkv=1.0)})
    assert next(criteria.among_the_best(about)).verdict == verdict


@pytest.mark.parametrize(("own", "verdict"), [(0.1, "met"), ([0.2, 0.2, 0.2, 0.21], "missed")])
def test_the_policy_without_retrieval_is_compared_with_the_second_reading(own: Any, verdict: str) -> None:
    about = measured(unseen="learned-text", needles=samples(**{"learned-text": own, "kvzip": 0.1}))
    lines = list(criteria.saw_no_retrieval(about))
    assert [line.verdict for line in lines] == [verdict, "not measured", "not measured", "not measured"]


@pytest.mark.parametrize(("own", "verdict"), [(0.1, "met"), (0.3, "missed")])
def test_longer_prompts_and_parts(own: float, verdict: str) -> None:
    records = samples(**{"learned": own, "kvzip": 0.2, "learned-heads": 0.5})
    about = measured(ablations=("learned-heads",), **{"length-2048": records, "parts": records})
    assert [line.verdict for line in criteria.above_every_method(about, "length-2048")] == [verdict]
    (line,) = criteria.parts_help(about)
    assert line.measured == f"{0.5 - own:+.4f} ± 0.0000 at 0.1"
    assert next(criteria.above_every_method(about, "length-4096")).verdict == "not measured"


def test_the_best_are_those_without_training_that_lose_least() -> None:
    config = StudyConfig(baselines=("kvzip", "snapkv", "fast_kvzip"))
    scores = kl_scores(samples(learned=0.1, kvzip=0.2, snapkv=0.3, fast_kvzip=0.05), config)
    assert best_by_kl(scores, 2) == ["kvzip", "snapkv"]


def test_pictures(tmp_path: Path) -> None:
    records = [
        {**one, "depth": depth, "length": length}
        for one in samples(learned=0.1, kvzip=0.2)
        for depth, length in ((0.0, 512), (100.0, 1024))
    ]
    figure = pictures.needle_heatmap(records, ["learned", "kvzip"])
    assert figure is not None
    cells = figure.axes[0].images[0].get_array()
    assert (cells[0, 0], cells[pictures.DEPTHS - 1, 1]) == (-1.0, -1.0)
    assert bool(np.isnan(cells.filled(np.nan)[1]).all())
    assert pictures.needle_heatmap(records, ["other"]) is None
    budgets = np.array([[0.1, 0.2], [0.3, 0.4]])
    assert pictures.rank_correlation(budgets, budgets**3) == pytest.approx(1.0)
    assert pictures.rank_correlation(budgets, -budgets) == pytest.approx(-1.0)
    assert pictures.agreement(budgets, {}) is None
    drawn = pictures.agreement(budgets, {"HeadKV": budgets})
    assert drawn is not None
    assert "1.00" in drawn.axes[0].get_title()
