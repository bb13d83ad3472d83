"""Rows of several caches as the rows of one."""

from collections.abc import Iterator

import pytest
import torch
from support.models import assert_logits_close, attached, kept, padded, tokens

from learnkv import CompressedCache, Policy, continuation, generate, prefill
from learnkv.cache.side_by_side import joinable, side_by_side
from learnkv.errors import UserError
from learnkv.evaluation.precisions import at_precision
from learnkv.persistence.policies import load_policy

NAMES = ("adakv", "pyramidkv", "knorm")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def at(precision: str | None, name: str) -> Policy:
    policy = load_policy(name)
    return policy if precision is None else at_precision(policy, precision)


def compressed(
    family: str = "llama", lengths: tuple[int, int] = (40, 31), precision: str | None = None
) -> list[CompressedCache]:
    """Two prompts of unequal length, compressed by three policies."""
    model = attached(family)
    ids, mask = padded([tokens(1, length, seed=length)[0] for length in lengths])
    policies = [at(precision, name) for name in NAMES]
    cache = prefill(model, ids, mask, policies=policies)
    budget = {"keep": 0.3} if precision is None else {"bytes": 0.3}
    return [policy.compress(cache.fork(), **budget) for policy in policies]


PRECISIONS = {
    "as read": None,
    "4 bits": "4",
    "two tiers": "K4V2:0.75+K8V3:0.25",
}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_each_row_goes_on_as_it_does_alone(family: str, precision: str | None) -> None:
    model, caches = attached(family), compressed(family, precision=precision)
    questions = tokens(6, 5, seed=1)
    joined = side_by_side(caches)
    alone = [cache.fork() for cache in caches]
    together = continuation(model, questions, joined)
    for number, cache in enumerate(alone):
        rows = slice(2 * number, 2 * number + 2)
        assert_logits_close(together[rows], continuation(model, questions[rows], cache))
    assert joined.prompt_lengths == [40, 31] * 3
    assert [cache.tail_length for cache in caches] == [0, 0, 0]


def test_rows_leave_the_batch_and_the_others_go_on() -> None:
    model, caches = attached("llama"), compressed()
    joined = side_by_side(caches)
    expected = torch.cat([generate(model, tokens(2, 3), cache.fork(), max_new_tokens=6) for cache in caches])
    found = generate(model, tokens(2, 3).repeat(3, 1), joined, max_new_tokens=6)
    assert torch.equal(found, expected)
    joined.batch_select_indices(torch.tensor([1, 4]))
    assert kept(joined, 0) == kept(caches[0], 1)
    assert kept(joined, 1) == kept(caches[2], 0)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_row_holds_the_bytes_that_it_holds_alone(precision: str | None) -> None:
    model, caches = attached("llama"), compressed(precision=precision)
    joined = side_by_side(caches)
    for cache in (joined, *caches):
        continuation(model, tokens(len(cache.prompt_lengths), 4), cache)
    assert joined.row_nbytes_with_tail() == [row for cache in caches for row in cache.row_nbytes_with_tail()]
    assert joined.spent == [spent for cache in caches for spent in cache.spent]


def test_what_cannot_be_joined_is_refused() -> None:
    model, caches = attached("llama"), compressed()
    quest, online = load_policy("quest"), load_policy("h2o_decode")
    other = [
        prefill(model, tokens(2, 40)),
        quest.compress(prefill(model, tokens(2, 40), policies=[quest]), keep=0.5),
        online.compress(prefill(model, tokens(2, 40), policies=[online]), budget=20),
    ]
    assert [joinable(cache) is None for cache in (*caches, *other)] == [False] * 3 + [True] * 3
    with pytest.raises(UserError, match="cache 1 cannot be joined"):
        side_by_side([caches[0], other[0]])
    with pytest.raises(UserError, match="cache 1 has other layers, slots, formats or tiers"):
        side_by_side([caches[0], compressed(lengths=(20, 30))[0]])
    with pytest.raises(UserError, match="cache 1 has other layers, slots, formats or tiers"):
        side_by_side([caches[0], compressed(precision="4")[0]])
    continuation(model, tokens(2, 1), caches[2])
    assert joinable(caches[2]) is None
