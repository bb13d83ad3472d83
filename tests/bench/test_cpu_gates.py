"""The counted comparison: known multiples of other caches, ours, and the table."""

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import cpu_gates
from benchmarks.cpu_gates import OURS, PEERS, SHAPE, measure, table


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return SHAPE.build(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gates, "PROMPTS", (128, 256))


def test_a_cache_that_is_copied_every_step_moves_three_times_what_it_holds(model: PreTrainedModel) -> None:
    row = measure(model, "HF DynamicCache", *PEERS["HF DynamicCache"])
    assert (row["moved"], row["allocated"], row["held"]) == pytest.approx((3, 1, 1), abs=0.05)
    assert row["waits"] >= 1


@pytest.mark.parametrize("keep", [1, 0])
def test_ours_moves_what_was_kept_and_waits_for_nothing(model: PreTrainedModel, keep: int) -> None:
    name = "learnkv full" if keep else "learnkv AdaKV, 128 entries"
    run = OURS[name][0] if keep else cpu_gates.learnkv("adakv", budget=100)
    row = measure(model, name, run, keep)
    assert (row["moved"], row["held"]) == pytest.approx((keep, keep), abs=0.09)
    assert row["waits"] == 0
    assert name in table([row])
