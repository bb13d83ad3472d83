"""Bytes of every row while tokens are added: those of the tensors that are alive, online eviction included."""

from collections.abc import Iterator

import pytest
import torch
from support.live_tensors import alive, reachable, storages
from support.models import attached, padded, tokens

from learnkv import CompressedCache, Policy, continuation, load_policy, prefill
from learnkv.allocators import Uniform
from learnkv.evaluation.tasks.held_bytes import HeldBytes
from learnkv.scorers import H2O, RKV, Knorm, SnapKV

LENGTHS = (57, 40)
POLICIES = {
    "queries": Policy(SnapKV(window=8), Uniform(), sinks=2, recent=3, evict_interval=6),
    "statistics": Policy(H2O(), Uniform(), sinks=2, recent=3, evict_interval=6),
    "both": Policy(RKV(window=4), Uniform(), sinks=2, recent=3, evict_interval=6, decode=H2O()),
    "positions": Policy(Knorm(), Uniform(), sinks=2, recent=3, rerotate="start"),
    "nothing": Policy(Knorm(), Uniform(), sinks=2, recent=3),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def compressed(name: str, precision: int | dict[str, int] | None = None) -> CompressedCache:
    policy = POLICIES[name] if precision is None else POLICIES[name].with_precision(precision)
    prompt = padded([tokens(1, length)[0] for length in LENGTHS])
    return policy.compress(prefill(attached("llama"), *prompt, policies=[policy]), keep=0.4)


def bookkeeping(cache: CompressedCache) -> set[int]:
    """Storages of a few numbers per token or head, and of what layers and codecs are: not what a budget is about."""
    parts = [cache.tail_mask, cache.budgets, *(cache.token_ids or ())]
    for layer in cache.compressed_layers():
        parts += layer.capture.functions.example if layer.capture.functions is not None else ()
        parts += [layer.tail.visible, layer._rotation[0] if layer._rotation is not None else None]
        parts += [basis for tier in layer.state.tiers for basis in tier._bases]
    return storages(part for part in parts if part is not None).keys() - storages(cache.tensors()).keys()


@pytest.mark.parametrize("precision", [None, 4, {"keys": 8, "values": 3}])
@pytest.mark.parametrize("name", POLICIES)
def test_rows_hold_what_is_alive(name: str, precision: int | dict[str, int] | None) -> None:
    cache, new, most = compressed(name, precision), tokens(2, 20, seed=1), [0, 0]
    held = HeldBytes(cache)
    for begin in range(0, 20, 2):
        continuation(attached("llama"), new[:, begin : begin + 2], cache)
        held.update(cache, [0, 1])
        rows, unknown = cache.row_nbytes_with_tail(), bookkeeping(cache)
        walked = sum(size for address, size in reachable(cache).items() if address not in unknown)
        assert sum(rows) == cache.nbytes == walked
        most = [max(pair) for pair in zip(most, rows, strict=True)]
    assert held.most == most


@pytest.mark.parametrize("precision", [None, 4])
def test_nothing_else_is_alive(precision: int | None) -> None:
    continuation(attached("llama"), tokens(2, 7), compressed("both", precision))  # what codecs make once
    before = alive()
    cache = compressed("both", precision)
    continuation(attached("llama"), tokens(2, 7), cache)
    new = {address: size for address, size in alive().items() if address not in before}
    assert sum(size for address, size in new.items() if address not in bookkeeping(cache)) == cache.nbytes


@pytest.mark.parametrize("name", ["queries", "statistics"])
def test_a_row_that_stays_holds_what_it_held(name: str) -> None:
    cache = compressed(name)
    continuation(attached("llama"), tokens(2, 10, seed=1), cache)
    rows = cache.row_nbytes_with_tail()
    assert rows[0] > rows[1]
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.row_nbytes_with_tail() == rows[1:]


def test_pages_count() -> None:
    model, policy = attached("llama"), load_policy("quest")
    cache = policy.compress(prefill(model, tokens(2, 50), policies=[policy]), keep=0.3)
    continuation(model, tokens(2, 1, seed=1), cache)
    held = HeldBytes(cache)
    held.update(cache, [0, 1])
    assert sum(held.most) > cache.full_nbytes
    assert sum(held.most) == cache.nbytes


def test_the_whole_cache_is_an_ordinary_one() -> None:
    model = attached("llama")
    cache = prefill(model, *padded([tokens(1, length)[0] for length in LENGTHS]))
    held = HeldBytes(cache)
    ids, mask = padded([tokens(1, 5)[0], tokens(1, 9)[0]], side="right")
    continuation(model, ids, cache, mask)
    held.update(cache, [0, 1])
    token = cache.full_nbytes / sum(LENGTHS)
    assert held.most == [token * (57 + 5), token * (40 + 9)]
