"""What a plan keeps."""

import dataclasses

import pytest
import torch

from learnkv.core.plan import Plan, baseline_of, changed
from learnkv.core.scorer import Scores

SCORES = torch.tensor([3.0, 1.0, torch.inf, 2.0, -torch.inf]).expand(1, 1, 2, 5)


def plan(budgets: list[int]) -> Plan:
    wanted = torch.tensor([[budgets]])
    return Plan(SCORES, wanted.double(), wanted, torch.tensor([1]), sum(budgets), SCORES)


def test_each_head_keeps_its_best() -> None:
    assert plan([3, 1]).kept[0, 0].int().tolist() == [[1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]


def test_changed_counts_what_the_other_does_not_keep() -> None:
    first = plan([3, 1])
    other = dataclasses.replace(first, scores=-SCORES.nan_to_num(posinf=-9, neginf=9))
    assert changed(first, first).tolist() == [0]
    assert changed(first, other).tolist() == pytest.approx([1 / 4])


def test_a_baseline_is_that_of_learned_scores() -> None:
    device = torch.device("cpu")
    assert baseline_of([Scores(SCORES[0])] * 2, device) is None
    learned = Scores(SCORES[0], 2 * SCORES[0], 3 * SCORES[0]).masked(SCORES[0] < 2, SCORES[0] == 2)
    baseline = baseline_of([learned] * 2, device)
    assert baseline.scores.shape == (2, 1, 2, 5)
    assert baseline.scores[0, 0, 0].tolist() == [6, -torch.inf, torch.inf, torch.inf, -torch.inf]
    assert baseline.scaled[1, 0, 0].tolist() == [9, -torch.inf, torch.inf, torch.inf, -torch.inf]
