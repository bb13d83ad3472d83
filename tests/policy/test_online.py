"""Eviction while tokens are added: the budget holds after every step, and the plan is the one for prompts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import components
from support.models import (
    DECODING,
    HEURISTICS,
    LEARNED,
    assert_logits_close,
    attached,
    heads_of,
    heuristic,
    oracle,
    padded,
    policy_for,
    tokens,
)

from learnkv import Policy, continuation, generate, load_policy, prefill
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.scorers import TOVA, GateScorer, HiddenScorer, SnapKV, StreamingLLM


def scores_later_tokens(policy: Policy) -> bool:
    """Whether nothing that the policy reads of a prompt is missing of later tokens."""
    return not (policy.scorer.needs or policy.scorer.extra_passes or policy.allocator.statistics)


SCORED = [name for name in HEURISTICS if scores_later_tokens(heuristic(name))]
TOKENS = {"hidden": HiddenScorer, "gate": GateScorer}
"""What these two, and `ranked`, read of hidden states or of several heads is held with every entry."""
SCORED += [*LEARNED, *TOKENS]
FEATURES = {"ranked": 4, "hidden": 1, "gate": 1, "fast_kvzip": 1}
every_policy = pytest.mark.parametrize("name", SCORED)
SOME = ["h2o", "snapkv", "adakv", "tova", "conditioned", "hidden"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def evicting(name: str, evict_interval: int, family: str = "llama", **changes: Any) -> Policy:
    if name in TOKENS:
        return Policy(components.build(TOKENS[name], 3, 2, 2, 16, 48), evict_interval=evict_interval, **changes)
    known = policy_for(name, attached(family))
    if known.evict_interval:  # of hundreds of tokens in some
        changes["decode"] = known.decode
    return Policy(known.scorer, known.allocator, known.sinks, known.recent, evict_interval, **changes)


def budgeted_bytes(cache: CompressedCache, name: str) -> int:
    """What may be held: entries within the budget with their positions and features, tables, a tail of so many slots
    with its last queries, or all where statistics read them, and hidden states, and the last queries before it."""
    schedule, layer = cache.schedule, cache.compressed_layers()[0]
    spec, interval = schedule.capture_spec, schedule.evict_interval
    layers, batch, heads = cache.budgets.shape
    dim, size = layer.segment.keys.shape[1], layer.segment.keys.element_size()
    features = 4 * FEATURES.get(name, 4 // heads * len(spec.statistics))  # of the tiny Llama's 4 query heads
    entries = sum(schedule.budget) * (2 * dim * size + 4 + features)
    tail = layers * batch * heads * (-(-interval // 64) * 64) * 2 * dim * size
    held = spec.window + (interval if spec.statistics else min(spec.window, interval))
    token = 4 * dim * size + 8  # queries with their slot or position
    hidden = layers * batch * interval * 48 * size * spec.reads_hidden
    return entries + tail + hidden + layers * batch * (held * token + heads * 2 * 8)


@pytest.mark.parametrize(
    ("name", "evict_interval", "spend"),
    [
        *((name, 7, {"budget": 12}) for name in SCORED),
        *((name, 1, {"keep": 0.3}) for name in SOME),
        *((name, 7, {"keep": 0.3}) for name in DECODING),
        *((name, 7, {"budget": 50}) for name in SOME),
    ],
)
def test_the_budget_holds_after_every_step(name: str, evict_interval: int, spend: dict[str, int]) -> None:
    model, policy = attached("llama"), evicting(name, evict_interval)
    cache = prefill(model, *padded([tokens(1, 40)[0], tokens(1, 23)[0]]), policy=policy, **spend)
    heads = 3 * 2
    budget = [round(0.3 * n * heads) for n in (40, 23)] if "keep" in spend else [spend["budget"] * heads] * 2
    assert list(cache.schedule.budget) == budget
    read = 0
    for new in [3, *[1] * (15 if evict_interval == 1 else 32)]:
        continuation(model, tokens(2, new, seed=read), cache)
        read += new
        assert cache.tail_length < evict_interval
        assert cache.budgets.sum((0, 2)).tolist() == list(cache.schedule.kept)
        assert all(held <= most for held, most in zip(cache.schedule.kept, budget, strict=True))
        assert [len(kept_of(cache, row)) for row in (0, 1)] == list(cache.schedule.kept)
        assert cache.nbytes <= budgeted_bytes(cache, name)
        assert cache.next_positions().tolist() == [40 + read, 23 + read]
    assert list(cache.schedule.kept) == [min(most, heads * n) for most, n in zip(budget, cache.lengths, strict=True)]


def kept_of(cache: CompressedCache, row: int) -> list[tuple[int, int, int]]:
    """(layer, head, position) of everything that is retained of a row."""
    return [
        (layer, head, position)
        for layer in cache.compressible
        for head in range(cache.layers[layer].heads)
        for position in cache.kept_positions(layer, row, head).tolist()
    ]


@every_policy
def test_what_is_kept_of_prompt_and_tail_is_what_would_be_kept_of_a_prompt(name: str) -> None:
    """Nothing is evicted before the budget is reached, so both have read the same; then one path plans for both."""
    model, policy = attached("llama"), evicting(name, evict_interval=21)
    first, more = tokens(2, 40), tokens(2, 21, seed=1)
    cache = prefill(model, first, policy=policy, budget=45)
    continuation(model, more, cache)
    whole = prefill(model, torch.cat([first, more], 1), policy=policy, budget=45)
    assert torch.equal(cache.budgets, whole.budgets)
    assert cache.spent == whole.spent == [45 / 61] * 2
    for row in (0, 1):
        ours, theirs = set(kept_of(cache, row)), set(kept_of(whole, row))
        assert len(ours ^ theirs) <= 2  # what was read in two parts may differ in the last bit
    if kept_of(cache, 0) == kept_of(whole, 0):
        said = tokens(2, 5, seed=2)
        assert_logits_close(continuation(model, said, cache)[0], continuation(model, said, whole)[0])


@pytest.mark.compat
@pytest.mark.parametrize("name", ["h2o", "adakv"])
def test_evicting_from_the_tail_is_masking(name: str) -> None:
    model, policy = attached("llama"), evicting(name, evict_interval=20)
    first, more, said = tokens(1, 30), tokens(1, 20, seed=1), tokens(1, 9, seed=2)
    cache = prefill(model, first, policy=policy, budget=35)
    continuation(model, more, cache)
    mask = torch.zeros(3, 2, 50, dtype=torch.bool)
    for layer, head, position in kept_of(cache, 0):
        mask[layer, head, position] = True
    assert mask.sum() == 35 * 6
    assert mask[..., 30:].any(-1).all()
    theirs = oracle("llama")(torch.cat([first, more], 1)[0], mask, said[0])
    assert_logits_close(continuation(model, said, cache)[0], theirs)


def test_heads_keep_the_budgets_that_they_were_given() -> None:
    model, policy = attached("llama"), evicting("adakv", evict_interval=8)
    cache = prefill(model, tokens(1, 60), policy=policy, keep=0.3)
    given = cache.budgets.clone()
    assert given.unique().numel() > 1
    generate(model, tokens(1, 4), cache, max_new_tokens=50)
    assert torch.equal(cache.budgets, given)
    newest = max(position for _, _, position in kept_of(cache, 0))
    assert newest >= 60 + 4 + 50 - 1 - 8
    for layer, head in ((0, 0), (1, 1), (2, 0)):  # of half of 18 entries, the recent ones first
        assert {0, *range(newest - 7, newest + 1)} <= set(cache.kept_positions(layer, 0, head).tolist())


def test_streaming_llm_keeps_the_first_and_the_latest_for_ever() -> None:
    model = attached("llama")
    cache = prefill(
        model, tokens(1, 30), policy=Policy(StreamingLLM(sinks=3), sinks=0, recent=0, evict_interval=1), budget=10
    )
    for step in range(25):
        continuation(model, tokens(1, 1, seed=step), cache)
        latest = range(30 + step + 1 - 7, 30 + step + 1)
        assert cache.kept_positions(0, 0, 0).tolist() == [0, 1, 2, *latest]


@pytest.mark.compat
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("name", "evict_interval"), [("h2o", 1), ("snapkv", 6), ("tokens", 6), ("tova", 16)])
def test_transformers_generates_the_same(family: str, name: str, evict_interval: int) -> None:
    model, policy = attached(family), evicting(name, evict_interval, family)
    ids, question = tokens(2, 40), tokens(2, 5, seed=1)
    ours = generate(model, question, prefill(model, ids, policy=policy, keep=0.3), max_new_tokens=30)
    cache = prefill(model, ids, policy=policy, keep=0.3)
    whole = torch.cat([ids, question], 1)
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **settings)
    assert torch.equal(ours, theirs[:, 45:])
    assert cache.continuation_length == 34


@pytest.mark.compat
@pytest.mark.parametrize("name", ["h2o", "snapkv", "rkv", "conditioned", "hidden", "ranked"])
@pytest.mark.parametrize(("evict_interval", "lengths"), [(1, (9, 2, 5)), (6, (4, 4, 4))])
def test_rows_of_a_batch_continue_as_alone(name: str, evict_interval: int, lengths: tuple[int, int, int]) -> None:
    """Where the batch evicts when each row would alone; rows end before others."""
    model, policy = attached("llama"), evicting(name, evict_interval)
    prompts = [tokens(1, length, seed=3)[0] for length in (50, 31, 44)]
    questions = [tokens(1, length, seed=4)[0] for length in lengths]
    together = prefill(model, *padded(prompts), policy=policy, keep=0.4)
    ids, mask = padded(questions, "right")
    ends = int(generate(model, ids, together.fork(), mask, max_new_tokens=20)[0, 3])
    said = generate(model, ids, together, mask, max_new_tokens=20, eos_token_id=ends)
    for row, prompt in enumerate(prompts):
        alone = prefill(model, prompt[None], policy=policy, keep=0.4)
        mine = generate(model, questions[row][None], alone, max_new_tokens=20, eos_token_id=ends)[0]
        assert torch.equal(said[row, : len(mine)], mine)
        assert (said[row, len(mine) :] == 0).all()
        if len(mine) == said.shape[1]:
            assert kept_of(together, row) == kept_of(alone, 0)
    positions = [
        n + len(one) + int((row != 0).sum()) for n, one, row in zip((50, 31, 44), questions, said, strict=True)
    ]
    unread = [int(row[-1] != 0) for row in said]
    assert together.next_positions().tolist() == [at - one for at, one in zip(positions, unread, strict=True)]


@pytest.mark.compat
def test_padding_within_the_tail_is_no_distance() -> None:
    """Neighbours that are pooled are the tokens next to each other, whatever stands between them in a batch."""
    model, policy = attached("llama"), Policy(SnapKV(window=4, kernel_size=7), sinks=0, recent=0, evict_interval=100)
    prompts = [tokens(1, length, seed=3)[0] for length in (50, 31, 44)]
    questions = [tokens(1, length, seed=4)[0] for length in (19, 5, 12)]
    more = tokens(3, 6, seed=5)
    together = prefill(model, *padded(prompts), policy=policy, keep=0.4)
    ids, mask = padded(questions, "right")
    continuation(model, ids, together, mask)
    continuation(model, more, together)
    together.schedule.evict(together)
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        alone = prefill(model, prompt[None], policy=policy, keep=0.4)
        continuation(model, question[None], alone)
        continuation(model, more[row : row + 1], alone)
        alone.schedule.evict(alone)
        assert kept_of(together, row) == kept_of(alone, 0)


@pytest.mark.compat
def test_a_fork_is_not_touched_and_rows_may_be_repeated() -> None:
    model, policy = attached("llama"), evicting("h2o", evict_interval=4)
    cache = prefill(model, tokens(2, 40), policy=policy, keep=0.3)
    continuation(model, tokens(2, 3, seed=1), cache)
    before, size = [kept_of(cache, row) for row in (0, 1)], cache.nbytes
    fork = cache.fork()
    fork.batch_repeat_interleave(2)
    fork.reorder_cache(torch.tensor([1, 0, 2, 2]))
    said = torch.cat([tokens(1, 9, seed=seed) for seed in (2, 3, 4, 4)])
    ours = torch.cat([continuation(model, one, fork) for one in said.split(1, 1)], 1)
    assert [kept_of(cache, row) for row in (0, 1)] == before
    assert (cache.nbytes, cache.tail_length, cache.schedule.kept) == (size, 3, (144 // 2,) * 2)
    assert fork.schedule.kept == (72,) * 4
    for row, one in enumerate((0, 0, 1, 1)):
        alone = cache.fork()
        alone.batch_select_indices(torch.tensor([one]))
        theirs = torch.cat([continuation(model, token, alone) for token in said[row : row + 1].split(1, 1)], 1)
        assert_logits_close(ours[row], theirs[0])
        assert kept_of(fork, row) == kept_of(alone, 0)


@pytest.mark.compat
def test_beams_stay_within_the_budget() -> None:
    model, policy = attached("llama"), evicting("snapkv", evict_interval=5)
    ids, question = tokens(1, 40), tokens(1, 3, seed=1)
    cache = prefill(model, ids, policy=policy, keep=0.3)
    beams = generate(model, question, cache, max_new_tokens=20, num_beams=3)
    assert beams.shape == (1, 20)
    assert cache.tail_length == 0  # the turn is read with the next one
    assert cache.schedule.kept == cache.schedule.budget
    again = prefill(model, ids, policy=policy, keep=0.3)
    again.batch_repeat_interleave(3)
    whole = torch.cat([ids, question], 1)
    settings = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(whole, attention_mask=torch.ones_like(whole), past_key_values=again, **settings)
    assert torch.equal(beams, theirs[:, 43:])


@pytest.mark.compat
def test_only_what_was_read_since_can_be_taken_back() -> None:
    model, policy = attached("llama"), evicting("h2o", evict_interval=10)
    cache, said = prefill(model, tokens(1, 40), policy=policy, keep=0.3), tokens(1, 8, seed=1)
    fork = cache.fork()
    continuation(model, said, cache)
    cache.crop(-5)
    for one, more in ((cache, said[:, 3:]), (fork, said)):
        continuation(model, more, one)
        continuation(model, tokens(1, 4, seed=2), one)
        continuation(model, tokens(1, 2, seed=3), one)
    assert kept_of(cache, 0) == kept_of(fork, 0)
    with pytest.raises(UserError, match=r"crop\(-3\): only the 2 tokens read after compression can be removed"):
        cache.crop(-3)


def test_another_scorer_may_score_while_tokens_are_added() -> None:
    model, ids, said = attached("llama"), tokens(1, 40), tokens(1, 12, seed=1)
    mixed = prefill(model, ids, policy=Policy(SnapKV(), sinks=0, recent=0, evict_interval=12, decode=TOVA()), budget=50)
    plain = prefill(model, ids, policy=Policy(TOVA(), sinks=0, recent=0, evict_interval=12), budget=50)
    for cache in (mixed, plain):
        continuation(model, said, cache)
    assert kept_of(mixed, 0) == kept_of(plain, 0)


def test_without_an_interval_the_tail_grows() -> None:
    model = attached("llama")
    cache = prefill(model, tokens(1, 40), policy=load_policy("h2o"), keep=0.3)
    continuation(model, tokens(1, 80, seed=1), cache)
    assert (cache.schedule, cache.tail_length) == (None, 80)
    assert heads_of(model) == 2
