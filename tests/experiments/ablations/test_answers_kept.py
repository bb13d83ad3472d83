"""The figures behind the order of the methods, on plans by hand."""

import pytest
import torch

from experiments.ablations.answers_kept import answer_tokens, figures, mean_ranks, retrieving, scores_of, table
from learnkv.core.plan import Plan


def test_the_tokens_of_an_answer() -> None:
    assert answer_tokens(["The ", "code", " is 4", "8", "17", ". 48"], "4817") == [2, 3, 4]


def test_what_heads_keep_of_an_answer() -> None:
    """Head (0, 1) keeps the first two of its order, head (1, 0) three; the answer is entries 1 and 3."""
    scores = torch.tensor([[[9.0, 8, 7, 6, 5], [1.0, 5, 2, 4, 3]], [[5.0, 4, 1, 2, 3], [0.0, 0, 0, 0, 0]]])[:, None]
    budgets = torch.tensor([[[5, 2]], [[3, 0]]])
    plan = Plan(scores, budgets.double(), budgets, torch.tensor([0]), 10, scores)
    kept, place, share = figures(plan, [(0, 1), (1, 0)], [1, 3])
    assert kept == pytest.approx((1 + 0.5) / 2)
    assert place == pytest.approx(1 - ((0 + 1) / 2 + (1 + 3) / 2) / 2 / 4)
    assert share == pytest.approx((2 / 5 + 3 / 5) / 2)


def test_the_heads_that_retrieve_are_in_the_upper_layers() -> None:
    assert sorted(retrieving(group=2)) == [(4, 2), (5, 2), (5, 3)]


def test_scores_stand_beside_and_ranks_are_correlated() -> None:
    told = {"setting": "query_agnostic", "task": "niah_single_2", "keep": 0.5}
    rows = [{**told, "policy": name, "score": score} for name, score in (("a", 90.0), ("b", 10.0), ("c", 20.0))]
    rows += [{**rows[0], "setting": "query_aware", "score": 0.0}, {**rows[0], "task": "vt", "score": 0.0}]
    assert scores_of({"rows": rows}, "query_aware") == {("a", 0.5): 0.0}
    scores = scores_of({"rows": rows}, "query_agnostic")
    assert scores == {("a", 0.5): 90.0, ("b", 0.5): 10.0, ("c", 0.5): 20.0}
    found = {
        (name, keep): (kept, 0.5, keep)
        for name, kept in (("a", 1.0), ("b", 0.4), ("c", 0.2))
        for keep in (0.5, 0.25, 0.1)
    }
    lines = list(table(found, scores))
    assert lines[2] == "| a | 0.50 | 1.00 · 0.50 · 90 | 1.00 · 0.25 · nan | 1.00 · 0.10 · nan |"
    assert lines[-1].endswith("over 3 cells: 0.50.")
    assert mean_ranks([3, 1, 3]) == [1.5, 0, 1.5]
