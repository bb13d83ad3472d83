"""What the comparison with kvpress counts as equal, on sets and scores made up here."""

from typing import Any

import numpy as np
import pytest
import torch
from support.models import build

from experiments.kvpress_comparison.__main__ import differing, mask
from experiments.kvpress_comparison.methods import METHODS
from learnkv import attach, prefill

SCORES = np.array([[[3.0, 2.0, 2.0, 1.0, np.inf]]], dtype=np.float32)


def kept(*slots: int) -> np.ndarray[Any, Any]:
    found = np.zeros((1, 1, 5), dtype=bool)
    found[..., slots] = True
    return found


@pytest.mark.parametrize(
    ("theirs", "differ", "untied"),
    [((0, 1, 4), 0, 0), ((0, 2, 4), 1, 0), ((0, 3, 4), 1, 1), ((2, 3, 4), 2, 1)],
    ids=["equal", "a tie", "another entry", "both"],
)
def test_entries_that_differ_are_ties_or_not(theirs: tuple[int, int, int], differ: int, untied: int) -> None:
    found = differing(kept(0, 1, 4), kept(*theirs), SCORES)
    assert found == {"differ": differ, "untied": untied, "entries": 3, "spent": 0.6}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_number_of_entries_that_it_is_told(name: str) -> None:
    cache = prefill(attach(build("llama")), torch.arange(2, 92).unsqueeze(0), policies=[METHODS[name].policy])
    found = mask(METHODS[name].policy.compress(cache.fork(), budget=20.5), 90)
    assert found.sum() == 20.5 * found[..., 0].size
