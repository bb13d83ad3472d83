"""What a cache holds, what it costs, and how forks and rows share it."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import FAMILIES, STATES
from support.live_tensors import alive, storages
from support.models import (
    HEURISTICS,
    LEARNED,
    assert_logits_close,
    attached,
    build,
    compressible,
    heads_of,
    kept,
    padded,
    policy_for,
    read,
    tokens,
)
from torch import Tensor, nn

from learnkv import CompressedCache, Policy, attach, continuation, prefill
from learnkv.allocators import Allocator
from learnkv.cache.state_layer import StateLayer
from learnkv.cache.states import Prompt
from learnkv.cache.storage import TAIL_CHUNK
from learnkv.errors import UserError
from learnkv.scorers import Knorm

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def held_bytes(cache: CompressedCache, tail: int = 0, kept_entries: int | None = None) -> int:
    """The formula: K, V and an int32 position per kept entry, two int64 tables per (layer, row, head), the tails.

    `tail` is the number of allocated slots of every tail.
    """
    layers, batch, heads = cache.budgets.shape
    layer = cache.compressed_layers()[0]
    dim, size = layer.segment.keys.shape[1], layer.segment.keys.element_size()
    entries = int(cache.budgets.sum()) if kept_entries is None else kept_entries
    return entries * (2 * dim * size + 4) + layers * batch * heads * (2 * 8 + tail * 2 * dim * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_keep_is_equal_bytes_and_the_bytes_of_the_formula(dtype: torch.dtype) -> None:
    model = attach(build("llama").to(dtype))
    whole = read(model, *padded([tokens(1, 100)[0], tokens(1, 61)[0]]))
    small = [policy_for(name, model).compress(whole.fork(), keep=0.25) for name in HEURISTICS + LEARNED]
    assert len({cache.nbytes for cache in small}) == 1
    assert small[0].nbytes == held_bytes(small[0], kept_entries=round(100 * 6 * 0.25) + round(61 * 6 * 0.25))
    assert whole.full_nbytes == 161 * 6 * 2 * 16 * dtype.itemsize == small[0].full_nbytes


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "lfm2"])
def test_the_bytes_are_what_a_walk_over_live_tensors_finds(family: str, one_shot: bool) -> None:
    model, policy = attached(family), policy_for("pyramidkv", attached(family))
    ids, mask = padded([tokens(1, 120)[0], tokens(1, 90)[0]])
    before = alive()
    if one_shot:
        cache = prefill(model, ids, mask, policy=policy, keep=0.2)
    else:
        parent = prefill(model, ids, mask)
        prompt = weakref.ref(parent.compressed_layers()[0].prompt.keys)
        cache = policy.compress(parent.fork(), keep=0.2)
        assert prompt() is not None
        del parent
        gc.collect()
        assert prompt() is None
    new = {address: size for address, size in alive().items() if address not in before}
    others = storages(
        tensor
        for layer in cache.layers
        for tensor in (
            (layer.keys, layer.values, layer._sliding_window_tensor)
            if layer.is_sliding
            else layer.states().values()
            if isinstance(layer, StateLayer)
            else ()
        )
    )
    assert cache.nbytes == held_bytes(cache)
    assert sum(new.values()) == cache.nbytes + sum(others.values())


def test_the_tail_grows_by_chunks_and_evicted_bytes_do_not_come_back() -> None:
    model = attached("llama")
    cache = policy_for("adakv", model).compress(prefill(model, tokens(2, 100)), keep=0.2)
    for step in range(1, TAIL_CHUNK + 3):
        continuation(model, tokens(2, 1), cache)
        assert cache.nbytes == held_bytes(cache, tail=TAIL_CHUNK * (1 + (step > TAIL_CHUNK)))


class OneHead(Allocator):
    """Everything to one head."""

    static = True

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        wanted = torch.zeros(scores.shape[:3], dtype=torch.float64)
        wanted[1, :, 1] = 1.0
        return wanted


def test_one_dominant_head_costs_nothing_extra() -> None:
    model = attached("llama")
    cache = Policy(Knorm(), OneHead(), sinks=1, recent=1).compress(prefill(model, tokens(2, 400)), keep=0.17)
    assert cache.budgets[1, :, 1].tolist() == [398, 398]
    assert cache.budgets[:, 0].flatten().tolist() == [2, 2, 2, 398, 2, 2]
    assert cache.nbytes <= 1.05 * 0.17 * cache.full_nbytes
    assert cache.nbytes == held_bytes(cache)


def test_a_fork_shares_storage_and_its_changes_are_its_own() -> None:
    model, ids, said = attached("llama"), tokens(2, 60), tokens(2, 70, seed=1)
    parent = prefill(model, ids)
    expected = continuation(model, said, prefill(model, ids))
    held = storages(parent.tensors())
    forks = [parent.fork() for _ in range(3)]
    assert all(storages(fork.tensors()) == held for fork in forks)
    small = policy_for("snapkv", model).compress(forks[0], keep=0.2)
    policy_for("adakv", model).relax(forks[1], keep=0.5)
    twins = [small.fork(), small.fork()]
    assert storages(parent.tensors()) == held
    first = continuation(model, said[:, :50], twins[0])
    again = twins[0].fork()  # with a tail by now
    assert again.nbytes == twins[0].nbytes
    assert storages(again.tensors()) == storages(twins[0].tensors())
    late = continuation(model, said[:, 50:], twins[0])
    assert small.tail_length == 0
    continuation(model, tokens(2, 3, seed=2), again)
    assert_logits_close(torch.cat([first, late], 1), continuation(model, said, twins[1]))
    assert torch.equal(continuation(model, said, parent), expected)
    assert forks[2].tail_length == 0


def test_beams_share_the_prompt() -> None:
    model = attached("llama")
    cache = policy_for("adakv", model).compress(prefill(model, tokens(2, 100)), keep=0.2)
    prompt, alone = cache.nbytes, cache.fork()
    cache.batch_repeat_interleave(5)
    tables = 3 * 2 * 2 * 2 * 8
    assert cache.nbytes == prompt - tables + 5 * tables
    logits = continuation(model, tokens(2, 4).repeat_interleave(5, 0), cache)
    assert_logits_close(logits, continuation(model, tokens(2, 4), alone).repeat_interleave(5, 0))
    assert cache.spent == alone.spent[:1] * 5 + alone.spent[1:] * 5


PHASES = ["dense", "compressed", "relaxed"]


@pytest.mark.compat
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("family", ["llama", "gemma3", *STATES])
def test_rows_are_repeated_and_chosen_in_every_phase(family: str, phase: str) -> None:
    model, policy = attached(family), policy_for("adakv", attached(family))
    prompts = [tokens(1, length)[0] for length in (30, 22, 17)]
    said, more = tokens(5, 4, seed=1), tokens(2, 3, seed=2)

    def fresh(*rows: int) -> CompressedCache:
        cache = prefill(model, *padded([prompts[row] for row in rows]))
        finish = {"dense": lambda: cache, "compressed": lambda: policy.compress(cache, keep=0.5)}
        return finish.get(phase, lambda: policy.relax(cache, keep=0.5))()

    cache = fresh(0, 1, 2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert cache.prompt_lengths == [17, 30]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1, 2, 0]))
    rows = [0, 2, 2, 0, 2]
    logits = continuation(model, said, cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([9, 1]))
    later = continuation(model, more, cache)
    assert cache.prompt_lengths == [17, 30]
    for at, row in enumerate(rows):
        assert_logits_close(logits[at], continuation(model, said[at : at + 1], fresh(row))[0])
    for at, row in enumerate((4, 0)):
        told = continuation(model, torch.cat([said[row], more[at]])[None], fresh(rows[row]))
        assert_logits_close(later[at], told[0, 4:])
    if phase != "dense":
        assert kept(cache, 1) == kept(fresh(0), 0)


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "streaming_llm", "adakv", "budgets"])
@pytest.mark.parametrize("chunk_size", [None, 33])
def test_reading_with_a_policy_is_reading_and_compressing(name: str, chunk_size: int | None) -> None:
    model, policy = attached("granite"), policy_for(name, attached("granite"))
    ids, mask = padded([tokens(1, 80)[0], tokens(1, 57)[0]])
    whole: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, None]) -> None:
        whole.append(sum(isinstance(layer.state, Prompt) for layer in kwargs["past_key_values"].layers))

    hooks = [layer.self_attn.register_forward_hook(count, with_kwargs=True) for layer in model.model.layers]
    at_once = prefill(model, ids, mask, chunk_size=chunk_size, policy=policy, keep=0.25)
    for hook in hooks:
        hook.remove()
    if chunk_size is None:
        assert whole == ([1, 2, 3] if name in ("adakv", "budgets") else [0, 0, 0])
    later = policy.compress(prefill(model, ids, mask, chunk_size=chunk_size), keep=0.25)
    assert [kept(at_once, row) for row in (0, 1)] == [kept(later, row) for row in (0, 1)]
    assert torch.equal(continuation(model, tokens(2, 5), at_once), continuation(model, tokens(2, 5), later))
    assert at_once.spent == later.spent
    assert at_once.nbytes == later.nbytes


def test_errors_of_an_empty_and_of_a_compressed_cache() -> None:
    model = attached("llama")
    empty = CompressedCache(model.config)
    with pytest.raises(UserError, match="the cache is empty: read a prompt first"):
        empty.seal()
    with pytest.raises(UserError, match="has not been read to its end"):
        empty.kept_positions(0, 0, 0)
    cache = prefill(model, *padded([tokens(1, 30)[0], tokens(1, 20)[0]]))
    assert (cache.prompt_lengths, cache.spent, cache.budgets) == ([30, 20], [1.0, 1.0], None)
    assert cache.kept_positions(0, 1, 0).tolist() == list(range(20))
    small = policy_for("knorm", model).compress(cache.fork(), budget=7.5)
    assert small.spent == [45 / 180, 45 / 120]
    assert small.budgets.sum((0, 2)).tolist() == [45, 45]
    again = policy_for("knorm", model)
    for retry in (again.compress, again.relax):
        with pytest.raises(UserError, match="already been compressed"):
            retry(small, keep=0.1)
    cache.batch_repeat_interleave(2)
    with pytest.raises(UserError, match="rows repeated or reordered"):
        again.compress(cache, keep=0.1)
    small.reset()
    assert (small.prompt_lengths, small.budgets, small.get_seq_length()) == ([], None, 0)
    ids = tokens(2, 12)
    logits = model(input_ids=ids, past_key_values=small).logits
    assert torch.equal(logits, model(input_ids=ids).logits)
    assert continuation(model, tokens(2, 1), small).shape[:2] == (2, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_are_prompt_positions_with_their_own_keys(family: str) -> None:
    model, policy = attached(family), policy_for("adakv", attached(family))
    whole = prefill(model, *padded([tokens(1, 40)[0], tokens(1, 28)[0]]))
    small = policy.compress(whole.fork(), keep=0.5)
    for at in compressible(model):
        for row, length in enumerate((40, 28)):
            for head in range(heads_of(model)):
                chosen = small.kept_positions(at, row, head)
                assert (chosen.diff() > 0).all()
                assert chosen[-1] == length - 1
                entries = small.layers[at].segment
                start, count = (int(table[row * heads_of(model) + head]) for table in (entries.offset, entries.length))
                assert count == len(chosen)
                prompt = whole.layers[at].prompt
                for pool, source in ((entries.keys, prompt.keys), (entries.values, prompt.values)):
                    expected = source[row, head, 40 - length :][chosen]
                    assert torch.equal(pool[start : start + count], expected)
