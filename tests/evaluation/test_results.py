"""Means, standard errors, paired differences and rows, against numbers worked out by hand."""

from math import exp, isnan, sqrt
from typing import Any

import pytest

from learnkv.evaluation.results import Estimate, estimate, mean_of_tasks, paired_difference, rows_of


def record(
    policy: str,
    index: int,
    score: float,
    task: str = "vt",
    keep: float | None = 0.5,
    budget: int | None = None,
    **more: float,
) -> dict[str, Any]:
    about = {
        "policy": policy,
        "metric": "generated",
        "task": task,
        "length": 64,
        "setting": "query_agnostic",
        "index": index,
    }
    size = {"asked": 0.25, "spent": 0.5 + index / 100, "bytes": 100 + index, "bytes_full": 200, "haystack": "noise"}
    return {**about, "keep": keep, "budget": budget, **size, "score": score, **more}


def test_estimate_is_mean_and_standard_error() -> None:
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == 3
    assert found.n == 3
    assert found.stderr == pytest.approx(sqrt(7 / 3))  # variance (4 + 1 + 9) / 2 over 3 samples
    assert isnan(estimate([4.0]).stderr)


def test_every_task_counts_the_same() -> None:
    found = mean_of_tasks([Estimate(10, 3, 100), Estimate(20, 4, 1)])
    assert found == Estimate(15, 2.5, 101)


def test_rows_take_the_full_cache_of_the_same_samples() -> None:
    records = [record("full", i, 100 - 10 * i, keep=1.0) for i in range(3)]
    records += [record("snapkv", i, s) for i, s in ((0, 40), (2, 80))]
    full, row = rows_of(records)
    assert (full["policy"], full["score"], full["score_full"], full["n"]) == ("full", 90, 90, 3)
    assert (row["score"], row["score_full"], row["n"]) == (60, 90, 2)
    assert row["stderr"] == pytest.approx(20)
    assert row["spent"] == pytest.approx(0.51)
    assert (row["bytes"], row["bytes_full"], row["haystack"]) == (101, 200, "noise")
    assert (row["kl"], row["perplexity"], row["budget"]) == (None, None, None)


def test_rows_hold_every_key_of_the_file_format() -> None:
    (row,) = rows_of([record("full", 0, 1.0, keep=1.0)])
    wanted = {"policy", "task", "length", "setting", "keep", "spent", "bytes", "bytes_full", "n", "score", "score_full"}
    assert set(row) >= wanted | {"kl", "stderr", "haystack"}
    assert row["stderr"] is None


def test_a_budget_in_tokens_is_shown_as_the_fraction_it_is() -> None:
    _, row = rows_of([record("full", 0, 1.0, keep=1.0), record("snapkv", 0, 1.0, keep=None, budget=16)])
    assert (row["keep"], row["budget"]) == (0.25, 16)


def test_tasks_budgets_and_policies_are_rows_of_their_own() -> None:
    records = [record("full", 0, 1.0, task=task, keep=1.0) for task in ("vt", "cwe")]
    records += [record(p, 0, 1.0, task=t, keep=k) for p in ("a", "b") for t in ("vt", "cwe") for k in (0.5, 0.1)]
    assert len(rows_of(records)) == 2 + 8


def test_text_has_kl_and_perplexity_of_the_mean_loss() -> None:
    records = [record("full", i, 50, keep=1.0, loss=1.0 + i, kl=0.0) for i in range(2)]
    records += [record("snapkv", i, 25, loss=2.0 + i, kl=0.1 * (i + 1)) for i in range(2)]
    full, row = rows_of(records)
    assert row["kl"] == pytest.approx(0.15)
    assert full["kl"] == 0
    assert row["perplexity"] == pytest.approx(exp(2.5))
    assert row["perplexity_full"] == pytest.approx(exp(1.5)) == full["perplexity"]


def test_paired_difference_is_over_common_prompts_and_tasks() -> None:
    ours = [record("a", i, s) for i, s in enumerate((10, 20, 60))] + [record("a", i, 50, task="cwe") for i in range(2)]
    theirs = [record("b", i, s) for i, s in enumerate((0, 20, 40))] + [
        record("b", i, s, task="cwe") for i, s in ((0, 50), (1, 40))
    ]
    found = paired_difference([*ours, record("a", 99, 0)], theirs)
    assert found.mean == pytest.approx((10 + 5) / 2)  # differences 10, 0, 20 and 0, 10
    assert found.stderr == pytest.approx(sqrt(100 / 3 + 50 / 2) / 2)
    assert found.n == 5


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    ours = [record("a", i, 10 * i + 1) for i in range(10)]
    theirs = [record("b", i, 10 * i) for i in range(10)]
    assert paired_difference(ours, theirs) == Estimate(1, 0, 10)
    assert estimate([one["score"] for one in ours]).stderr > 9


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prompt in common"):
        paired_difference([record("a", 0, 1)], [record("b", 1, 1)])
