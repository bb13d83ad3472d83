"""The figures of experiments/ablations/shuffled_orders.py."""

import torch
from support.models import attached, tokens

from experiments.ablations.shuffled_orders import KEEPS, Shuffled, policies_of, scales, table, unsampled
from learnkv import Policy, load_policy, prefill
from learnkv.allocators import Flat
from learnkv.scorers import SnapKV


def test_budgets_stay_and_one_layer_keeps_others() -> None:
    plain = Policy(SnapKV(window=16), Flat())
    drawn = Policy(Shuffled(plain.scorer, [1]), plain.allocator)
    with torch.no_grad():
        cache = prefill(attached("llama"), tokens(1, 90), policies=[plain, drawn])
    ours, theirs = (policy.plan(cache.fork(), 0.3) for policy in (drawn, plain))
    assert torch.equal(ours.budgets, theirs.budgets)
    changed = (ours.kept != theirs.kept).any(-1)[:, 0]
    assert changed.any(-1).tolist() == [False, True, False]


def test_a_learned_policy_without_its_noise() -> None:
    policy = load_policy("reference")
    plain = unsampled(policy)
    assert plain.scorer.sampling_scales().max() < 1e-3
    assert policy.scorer.sampling_scales().max() > 0.3  # the shipped one is as it was
    rows = list(scales(policy.scorer))
    assert len(rows) == 2 + 6
    assert rows[2].count("|") == 6


def test_every_method_stands_beside_itself() -> None:
    names = list(policies_of(["snapkv", "learned"], 2))
    assert names[:3] == ["snapkv", "learned", "learned, without its noise"]
    assert names[3:5] == ["snapkv, layer 0", "snapkv, layer 1"]


def test_differences_are_paired_by_window() -> None:
    rows = [("a", (1.0, 3.0)), ("a, layer 0", (2.0, 4.0)), ("full", (0.0, 0.0))]
    records = [
        {"policy": name, "keep": KEEPS[0], "index": index, "kl": one}
        for name, each in rows
        for index, one in enumerate(each)
    ]
    lines = list(table(records, ["a"], 1, KEEPS[0]))
    assert lines[2] == "| a | 2.0000 ± 1.0000 | +1.0000 ± 0.0000 |"
