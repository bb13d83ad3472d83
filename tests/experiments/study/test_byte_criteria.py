"""Criteria under budgets of bytes, on made-up samples that meet them and that miss them."""

from typing import Any

import pytest
from support.samples import record

from experiments.study.config import StudyConfig
from experiments.study.listed import byte_criteria
from experiments.study.listed.byte_criteria import METHOD, UNIFORM
from experiments.study.listed.criteria import Measured
from experiments.study.scores import Scores

PROMPTS = 50
METHODS = ("kvzip", "snapkv")


def samples(
    metric: str = "forced", part: float = 0.0125, prompts: int = PROMPTS, **values: Any
) -> list[dict[str, Any]]:
    """Prompts of one task; of each policy its KL (forced) or score (generated): a number, or some in turn."""
    found = []
    for name, numbers in {"full": 0.0 if metric == "forced" else 100.0, **values}.items():
        each = numbers if isinstance(numbers, list) else [numbers]
        for at in range(prompts):
            value = each[at % len(each)]
            more: dict[str, Any] = {"kl": value, "metric": metric} if metric == "forced" else {}
            if name not in ("full", "full@4"):
                more |= {"keep": None, "bytes_budget": part, "bytes": 1000 * part - 1}
            score = 100.0 if metric == "forced" else value
            found.append({**record(name, "vt", at, score, 1.0, prefills=1.0), **more})
    return found


def measured(ablations: tuple[str, ...] = (), **records: list[dict[str, Any]]) -> Measured:
    return Measured(StudyConfig("smollm2", uniform="smollm2", ablations=ablations, baselines=METHODS), records)


@pytest.mark.parametrize(
    ("own", "prompts", "verdict"), [(91.0, 50, "met"), (89.0, 50, "missed"), (91.0, 49, "not measured")]
)
def test_the_share_of_the_full_cache_needs_enough_prompts(own: float, prompts: int, verdict: str) -> None:
    about = measured(generated=samples("generated", 0.025, prompts, learned=own))
    line = byte_criteria.retains(about, 0.025, 90.0)
    assert line.verdict == verdict
    assert ("expected 50" in line.measured) == (verdict == "not measured")
    assert byte_criteria.retains(about, 0.05, 97.0).verdict == "not measured"


def test_shares_are_means_over_tasks_of_paired_ratios() -> None:
    found = [*samples("generated", learned=[50.0, 100.0])]
    easy = [{**one, "task": "niah", "score": 80.0 if one["policy"] == "full" else 20.0} for one in found]
    scores = Scores([*found, *easy], 60.0)
    ratio = scores.paired_ratio("learned", 0.0125)
    assert ratio.mean == pytest.approx((75 + 25) / 2)
    assert ratio.stderr == pytest.approx(scores.minus("learned", "learned", 0.0125).stderr + 25 / 49**0.5 / 2)
    assert scores.unit == "bytes"


@pytest.mark.parametrize(
    ("own", "uniform", "verdict"),
    [([80.0, 90.0], 50.0, "met"), ([80.0, 90.0], [80.0, 90.0], "missed"), ([0.0, 100.0], 40.0, "missed")],
)
def test_everything_else_is_clearly_below(own: Any, uniform: Any, verdict: str) -> None:
    records = samples("generated", **{"learned": own, "learned@4": uniform, "kvzip@8": 20.0, "full@4": 99.0})
    line = byte_criteria.above_everything(measured(generated=records))
    assert line.verdict == verdict
    assert "over learned@4, of 2 others" in line.measured  # the whole cache takes more


@pytest.mark.parametrize(("own", "verdict"), [(0.055, "met"), (0.065, "missed"), ([0.02, 0.09], "missed")])
def test_kl_is_clearly_below_a_part_of_the_best_method(own: Any, verdict: str) -> None:
    records = samples(**{"learned": own, "kvzip@4": 0.1, "kvzip@8": 0.3, "snapkv@4": 0.2, "learned@4": 0.01})
    (line,) = byte_criteria.loses_less(measured(needles=records), "needles", {0.0125: 0.6}, "needles", METHOD)
    assert (line.verdict, line.measured.split()[2]) == (verdict, "kvzip@4")
    (line,) = byte_criteria.loses_less(measured(needles=records), "needles", {0.05: 0.6}, "needles", METHOD)
    assert line.verdict == "not measured"


def test_learned_scores_at_uniform_precisions_are_a_bar_of_their_own() -> None:
    records = samples(**{"learned": 0.07, "learned@4": 0.2, "learned@K4V3": 0.1, "kvzip@4": 0.01})
    (line,) = byte_criteria.loses_less(measured(needles=records), "needles", {0.0125: 0.8}, "needles", UNIFORM)
    assert line.verdict == "met"
    assert line.measured.startswith("0.70 of learned@K4V3")


def test_a_method_that_takes_more_than_its_bytes_is_no_rival() -> None:
    records = [{**one, "bytes": 20} if one["policy"] == "kvzip@4" else one for one in samples(**{"kvzip@4": 0.1})]
    assert Scores(records, 0.0, "kl").rivals(0.0125) == []
    assert Scores(samples(**{"kvzip@4": 0.1}), 0.0, "kl").rivals(0.0125) == ["kvzip@4"]


@pytest.mark.parametrize(("times", "verdict"), [(1.0, "met"), (1.25, "missed")])
def test_the_prompt_is_read_once(times: float, verdict: str) -> None:
    records = [{**one, "prefills": times} for one in samples(learned=0.1)]
    assert byte_criteria.reads_once(measured(needles=records)).verdict == verdict


@pytest.mark.parametrize(("part", "verdict"), [([0.2, 0.3], "met"), ([0.1, 0.1], "missed"), ([0.05, 0.05], "missed")])
def test_a_part_that_does_not_help_is_named(part: list[float], verdict: str) -> None:
    records = samples(**{"learned": 0.1, "learned-heads": part})
    about = measured(("learned-heads",), parts=records)
    (line,) = byte_criteria.parts_earn_their_place(about)
    assert line.verdict == verdict
    assert [line.verdict for line in byte_criteria.lines(measured())] == ["not measured"] * (2 + 1 + 3 + 2 + 3 + 1)
