"""Bits in a record are those of the tiers: by head and by position."""

import torch
from support.models import attached, padded, tokens

from experiments.study.listed.pictures import bits
from learnkv import Policy, prefill
from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.evaluation.stored_bits import BINS, stored_bits
from learnkv.precision import FixedTiers
from learnkv.scorers import SnapKV

LENGTHS, HEADS = (57, 40), 2


def test_bits_are_those_of_the_levels_and_add_up() -> None:
    precision = FixedTiers(["K4V2", "K8V8"], [0.6, 0.4])
    made = Policy(SnapKV(window=8), LearnedAllocator(Uniform(), 3, HEADS, by="scores"), precision=precision)
    cache = prefill(attached("llama"), *padded([tokens(1, n)[0] for n in LENGTHS]), policies=[made])
    plan = made.plan(cache, bytes=0.3)
    compressed = made.compress(cache, bytes=0.3)
    of_level = torch.tensor([0.0, *(level.bits(16) for level in precision.levels)])
    assert of_level[1:].tolist() == [5, 10]  # 16 numbers: 3 and 8 bits on average, scales of two bits each
    for row, length in enumerate(LENGTHS):
        found = stored_bits(compressed, row)
        chosen = of_level[plan.chosen[:, row, :, max(LENGTHS) - length :].long()]
        want = chosen.sum(-1) / (chosen > 0).sum(-1)
        torch.testing.assert_close(torch.tensor(found["bits"]), want, atol=1e-3, rtol=0)
        first = chosen[..., : -(-length // BINS)].mean().item()
        assert abs(found["bits_by_position"][0] - first) < 1e-3
        assert len(found["bits_by_position"]) == BINS


def test_the_picture_has_a_column_per_budget_and_is_of_one_policy() -> None:
    record = {"policy": "a", "keep": None, "budget": None, "bits": [[4.0, 5.0]], "bits_by_position": [0.5] * BINS}
    records = [{**record, "bytes_budget": part} for part in (0.05, 0.025)]
    figure = bits(records, "a")
    assert figure is not None
    assert len(figure.axes) == 5
    assert bits(records, "b") is None
    assert bits([{**record, "bytes_budget": 0.05, "policy": "b"}], "a") is None
