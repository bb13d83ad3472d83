"""Every criterion of a study on made-up samples that meet it, and on others that miss it."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.samples import record

from experiments.study import criteria
from experiments.study.results import Results
from experiments.study.scores import Scores

KEEPS = (0.5, 0.25, 0.1, 0.05, 0.02)


def scores(
    setting: str = "query_agnostic",
    value: str = "score",
    keeps: tuple[float, float, float, float, float] = KEEPS,
    trained: tuple[str, ...] = ("fast_kvzip",),
    **policies: Any,
) -> Scores:
    """Four prompts; a policy has one number for all of them, or a number for each."""
    more = (lambda one: {"kl": one}) if value == "kl" else (lambda one: {})
    found = []
    for name, numbers in {"full": 100.0, **policies}.items():
        each = numbers if isinstance(numbers, list) else [numbers] * 4
        for keep in (1.0,) if name == "full" else keeps:
            found += [record(name, "vt", at, one, keep, setting, **more(one)) for at, one in enumerate(each)]
    return Scores(found, min_full_score=80, value=value, trained=trained)


@pytest.mark.parametrize(("score", "verdict"), [(95.0, "met"), (94.0, "missed")])
def test_a_share_of_the_full_cache_is_retained(score: float, verdict: str) -> None:
    line = criteria.retains("learned", scores(learned=score), 0.1, 95)
    assert line.verdict == verdict
    assert line.measured == f"{score:.1f} ± 0.0 %"
    assert criteria.retains("learned", scores(other=1.0), 0.1, 95).verdict == "not measured"


@pytest.mark.parametrize(
    ("ours", "rival", "verdict"),
    [
        ([60.0, 70.0, 60.0, 70.0], 50.0, "met"),  # 15 above, error 2.9
        ([50.0, 70.0, 50.0, 60.0], 50.0, "missed"),  # 7.5 above, error 4.8
        ([97.0, 97.0, 97.0, 97.0], 99.0, "met"),  # less than the other one, and nearly full
        ([96.0, 96.0, 96.0, 97.0], 99.0, "missed"),
    ],
)
def test_every_method_is_clearly_beaten_or_nothing_is_lost(ours: list[float], rival: float, verdict: str) -> None:
    line = criteria.beats_all("learned", scores(learned=ours, kvzip=rival, snapkv=20.0), 0.1)
    assert line.verdict == verdict
    assert " over kvzip; " in line.measured


def test_a_trained_method_is_named_and_decides_only_where_every_method_counts() -> None:
    """Ours is above every method without training and below a trained one."""
    for setting, criterion in (("query_agnostic", criteria.beats_all), ("query_aware", criteria.is_among_the_best)):
        found = {"learned": 60.0, "kvzip": 50.0, "fast_kvzip": 80.0, "duo_attention": 10.0}
        line = criterion("learned", scores(setting, trained=("fast_kvzip", "duo_attention"), **found), 0.1)
        assert line.verdict == ("met" if setting == "query_agnostic" else "missed")
        assert line.measured.startswith("+10.0 ± 0.0 over kvzip")
        assert line.measured.endswith("; -20.0 ± 0.0 over fast_kvzip (trained)")
        assert criterion("learned", scores(setting, trained=(), **found), 0.1).verdict == "missed"
        assert criterion("learned", scores(setting, learned=60.0, fast_kvzip=80.0), 0.1).verdict == "not measured"
    text = scores(value="kl", learned=0.1, kvzip=0.4, fast_kvzip=0.125)
    line = criteria.loses_less_text("learned", text, 0.25, 0.5)
    assert line.verdict == "met"
    assert line.measured.endswith("0.25 (0.1000 nats per token) of kvzip; 0.80 of fast_kvzip (trained)")


def test_one_method_that_is_not_beaten_is_enough_to_miss() -> None:
    line = criteria.beats_all("learned", scores(learned=60.0, kvzip=10.0, keydiff=60.0), 0.1)
    assert line.verdict == "missed"
    assert "not clearly above keydiff" in line.measured
    assert "+0.0 ± 0.0 over keydiff" in line.measured


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [([90.0] * 4, "met"), ([89.0, 91.0, 88.0, 90.0], "met"), ([89.0, 89.5, 88.0, 88.5], "missed")],
)
def test_with_the_question_it_is_among_the_best(ours: list[float], verdict: str) -> None:
    """0 behind; 0.5 behind with an error of 0.65; 1.25 behind with an error of 0.32."""
    line = criteria.is_among_the_best("learned", scores("query_aware", learned=ours, snapkv=90.0, knorm=5.0), 0.1)
    assert line.verdict == verdict
    assert "over snapkv" in line.measured


@pytest.mark.parametrize(("ours", "verdict"), [(0.1, "met"), (0.15, "missed")])
def test_text_is_moved_half_as_far(ours: float, verdict: str) -> None:
    text = scores(value="kl", learned=ours, kvzip=0.2, snapkv=0.9)
    line = criteria.loses_less_text("learned", text, 0.25, 0.5)
    assert line.verdict == verdict
    assert line.measured.endswith("of kvzip")
    assert criteria.loses_less_text("learned", None, 0.25, 0.5).verdict == "not measured"


@pytest.mark.parametrize(
    ("alone", "verdict"), [([80.0, 82.0, 84.0, 82.0], "met"), ([84.0, 86.0, 84.0, 85.0], "missed")]
)
def test_one_checkpoint_is_as_good_as_one_per_budget(alone: list[float], verdict: str) -> None:
    """2 behind with an error of 0.8 is more than two, 0 is not."""
    found = scores(**{"learned": [80.0, 83.0, 83.0, 82.0], "learned-only": alone})
    assert criteria.serves_all_budgets("learned", "learned-only", found, 0.1).verdict == verdict


@pytest.mark.parametrize(
    ("own", "other", "verdict"),
    [([90.0, 92.0, 91.0, 93.0], 80.0, "met"), ([80.0, 92.0, 70.0, 93.0], 82.0, "missed"), (70.0, 80.0, "missed")],
)
def test_conditioning_counts_where_strange_features_cost(own: float | list[float], other: float, verdict: str) -> None:
    results = Results(
        "learned",
        changed={"learned": {"0.1": [0.2, 0.4]}},
        shuffled=scores(**{"learned": own, "learned-shuffled": other}),
    )
    changed, worth = criteria.conditioning_counts(results)
    assert changed.measured == "30.0 % at 0.1"
    assert worth.verdict == verdict


@pytest.mark.parametrize(("ours", "verdict"), [(60.0, "met"), (59.0, "missed")])
def test_without_retrieval_it_keeps_up_with_the_strongest(ours: float, verdict: str) -> None:
    results = Results(
        "learned",
        settings={"query_agnostic": scores(**{"learned-text": ours, "kvzip": 60.0})},
        out_of_domain={
            "greek": scores(learned=50.0, kvzip=40.0),
            "memo": Scores([record("full", "vt", 0, 10.0, 1.0)], min_full_score=80),
        },
        unseen="learned-text",
    )
    *of_keeps, greek, memo = criteria.generalises(results)
    assert [line.verdict for line in of_keeps] == [verdict] * 5
    assert greek.measured.startswith("50.0 ± 0.0 at 0.5")
    assert "full cache 100.0; over kvzip +10.0 ± 0.0 at 0.5, " in greek.measured
    assert memo.measured == "no task that the full cache answers"


@pytest.mark.parametrize(("needles", "verdict"), [(96.0, "met"), (93.0, "missed")])
def test_a_task_is_scored_by_the_policy_that_did_not_practise_it(needles: float, verdict: str) -> None:
    """What a policy has in the family that it did practise counts for nothing: here 0."""
    tasks = {"niah_single_1": {"learned-a": needles, "learned-b": 0.0}, "vt": {"learned-a": 0.0, "learned-b": 95.0}}
    found = [
        record(policy, task, at, score, 1.0 if policy == "full" else keep)
        for task, of_policy in tasks.items()
        for policy, score in {"full": 100.0, "kvzip": 90.0, **of_policy}.items()
        for keep in ((1.0,) if policy == "full" else (0.25, 0.1))
        for at in range(4)
    ]
    results = Results(
        "learned",
        settings={"query_agnostic": Scores(found, min_full_score=80)},
        held_out={"learned-a": ["niah"], "learned-b": ["vt"]},
    )
    loose, tight = criteria.families_held_out(results)
    mean = (needles + 95) / 2
    assert loose.verdict == "reported"
    assert tight.verdict == verdict
    assert tight.measured == f"{mean:.1f} ± 0.0 % of 2 tasks; {mean - 90:+.1f} ± 0.0 over kvzip"
    (none, _) = criteria.families_held_out(replace(results, held_out={"learned-c": ["niah"]}))
    assert none.verdict == "not measured"


@pytest.mark.parametrize("missing", [None, "marginal.png", "val/gap@0.1"])
def test_what_is_to_be_logged_and_drawn_lies_in_the_run(tmp_path: Path, missing: str | None) -> None:
    names = [f"val/{name}@0.1" for name in criteria.LOGGED]
    with (tmp_path / "metrics.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["step", *(name for name in names if name != missing)])
        writer.writerow(["3", *("0.5" for name in names if name != missing)])
    for name in criteria.DRAWN:
        if name != missing:
            (tmp_path / name).write_text("")
    line = criteria.logs_and_draws(Results("learned", runs={"learned": tmp_path}))
    assert line.verdict == ("missed" if missing else "met")


def test_all_lines_stand_in_the_order_in_which_they_were_set() -> None:
    both = {one: scores(one, learned=100.0, kvzip=50.0) for one in ("query_agnostic", "query_aware")}
    results = Results("learned", settings=both, text=scores(value="kl", learned=0.1, kvzip=0.3), single={})
    verdicts = [line.verdict for line in criteria.lines(results)]
    assert verdicts == ["met"] * 14 + ["not measured"]
    alone = [line.about for line in criteria.lines(replace(results, settings={}))]
    assert alone[0].startswith("held-out text, keep 0.25")
    assert len(alone) == 3
