"""Coverage: tokens that are kept anywhere, and scores that raise it at an equal budget."""

import pytest
import torch
from support.models import attached, padded, tokens
from support.observations import observe

from learnkv import CompressedCache, Policy, load_policy, prefill
from learnkv.errors import UserError
from learnkv.scorers import KVEC, CriticalKV, SnapKV, StreamingLLM


def compressed(policy: Policy, **spend: float) -> CompressedCache:
    ids = padded([tokens(1, 90)[0], tokens(1, 47)[0]])
    return policy.compress(prefill(attached("llama"), *ids, policies=[policy]), **spend)


def test_coverage_counts_distinct_tokens_of_all_layers_and_heads() -> None:
    policy = load_policy("snapkv")
    cache = compressed(policy, keep=0.3)
    expected = []
    for row, length in enumerate((90, 47)):
        sets = [cache.kept_positions(layer, row, head).tolist() for layer in cache.compressible for head in (0, 1)]
        expected.append(len({position for own in sets for position in own}) / length)
    assert cache.coverage == expected
    assert 0.3 < expected[0] < 1
    alike = Policy(StreamingLLM())  # the same tokens in every head
    assert compressed(alike, keep=0.3).coverage == pytest.approx([0.3, 0.3], abs=0.02)
    assert compressed(alike, keep=1.0).coverage == [1.0, 1.0]


def test_coverage_rises_with_the_weight_at_an_equal_budget() -> None:
    reached = []
    for weight in (0.0, 0.1, 1.0):
        cache = compressed(Policy(KVEC(SnapKV(), weight)), keep=0.25)
        assert cache.spent == pytest.approx([0.25, 0.25], abs=0.01)
        reached.append(cache.coverage[0])
    assert reached[0] == compressed(load_policy("snapkv"), keep=0.25).coverage[0]
    assert reached[0] < reached[1] < reached[2]


def scored(scores: list[list[list[float]]], budget: int, **options: object) -> list[list[list[int]]]:
    """Slots that each head of each layer keeps, of scores [L][H][S]."""
    wanted = torch.tensor(scores).unsqueeze(1)
    layers = [observe([wanted.shape[-1]]) for _ in scores]
    counts = torch.full(wanted.shape[:-1], budget)
    ranked = KVEC(SnapKV(), **options).refine_layers(layers, wanted, counts)[:, 0]
    return ranked.topk(budget).indices.sort(-1).values.tolist()


def test_a_head_leaves_a_token_to_an_earlier_one() -> None:
    same = [[[4.0, 3.0, 2.9, 0.0], [4.0, 3.0, 2.9, 0.0]], [[4.0, 3.0, 2.9, 0.0], [4.0, 3.8, 2.9, 0.0]]]
    assert scored(same, 2, weight=0.0) == [[[0, 1], [0, 1]], [[0, 1], [0, 1]]]
    assert scored(same, 2, weight=0.2, layers=False) == [[[0, 1], [0, 2]], [[0, 1], [0, 1]]]
    assert scored(same, 2, weight=0.2, heads=False) == [[[0, 1], [0, 1]], [[0, 2], [0, 1]]]
    assert scored(same, 2, weight=1.1) == [[[0, 1], [2, 3]], [[0, 1], [0, 1]]]  # in the end every token is kept


def test_protected_entries_stay_and_a_base_that_ranks_by_budgets_is_refused() -> None:
    protected = [[[torch.inf, 3.0, 2.0, 0.0], [torch.inf, 3.0, 2.9, 0.0]]]
    assert scored(protected, 2, weight=1.0) == [[[0, 1], [0, 2]]]
    for base in (CriticalKV(SnapKV()), KVEC(SnapKV())):
        with pytest.raises(UserError, match="ranks by a head's budget"):
            KVEC(base)
