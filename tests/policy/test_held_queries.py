"""Queries that are held until the next online eviction: the last of every row, and the same entries are kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import attached, padded, tokens
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, generate, prefill
from learnkv.cache.capture import Capture
from learnkv.errors import UserError
from learnkv.scorers import H2O, RKV, SnapKV

INTERVAL, WINDOW, LENGTHS = 24, 4, (50, 31, 44)
POLICIES = {
    "rkv": Policy(RKV(window=WINDOW, kernel_size=3), sinks=1, recent=2, evict_interval=INTERVAL),
    "snapkv": Policy(SnapKV(window=WINDOW, kernel_size=3), sinks=0, recent=0, evict_interval=INTERVAL),
}
Use = Callable[[CompressedCache], CompressedCache]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def read(policy: Policy) -> CompressedCache:
    prompts = padded([tokens(1, length, seed=3)[0] for length in LENGTHS])
    return prefill(attached("llama"), *prompts, policy=policy, keep=0.3)


def hold_all(self: Any, queries: Tensor, slots: int, is_token: Tensor | None) -> None:
    """`Capture.hold_back` without a limit."""
    self.unread = queries if self.unread is None else torch.cat([self.unread, queries], 2)


def kept_of(cache: CompressedCache) -> list[list[int]]:
    """Positions that every row's heads retain."""
    rows, heads = range(len(cache.prompt_lengths)), range(cache.layers[0].heads)
    where = [(layer, row, head) for layer in cache.compressible for row in rows for head in heads]
    return [cache.kept_positions(*head).tolist() for head in where]


def go_on(cache: CompressedCache, count: int, seed: int, size: int = 1) -> None:
    for part in tokens(len(cache.prompt_lengths), count, seed=seed).split(size, 1):
        continuation(attached("llama"), part, cache)


def ask(cache: CompressedCache) -> None:
    """Questions of different lengths."""
    ids, mask = padded([tokens(1, length, seed=4)[0] for length in (9, 2, 5)], "right")
    continuation(attached("llama"), ids, cache, mask)


def steps(cache: CompressedCache) -> CompressedCache:
    go_on(cache, INTERVAL + 10, seed=5, size=3)
    go_on(cache, INTERVAL, seed=6)
    return cache


def rows_end(cache: CompressedCache) -> CompressedCache:
    """Padding of questions and of answers: a row's last tokens lie further back than the window."""
    ids, mask = padded([tokens(1, length, seed=4)[0] for length in (9, 2, 5)], "right")
    model = attached("llama")
    ends = int(generate(model, ids, cache.fork(), mask, max_new_tokens=20)[0, 2])
    said = generate(model, ids, cache, mask, max_new_tokens=14, eos_token_id=ends)
    assert (said[0, 3:] == 0).all()
    assert (said[:, -1] != 0).any()
    go_on(cache, 2, seed=6)
    return cache


def other_rows(cache: CompressedCache) -> CompressedCache:
    ask(cache)
    go_on(cache, 6, seed=5)
    cache.batch_select_indices(torch.tensor([2, 0]))
    go_on(cache, INTERVAL, seed=6)
    return cache


def cropped(cache: CompressedCache) -> CompressedCache:
    """Further than what is held, twice, and one token more than that before the eviction is due."""
    go_on(cache, INTERVAL - 1, seed=5)
    cache.crop(-3 * WINDOW)
    go_on(cache, 3 * WINDOW, seed=6)
    cache.crop(-1)
    go_on(cache, 1 + WINDOW, seed=7)
    return cache


def forked(cache: CompressedCache) -> CompressedCache:
    ask(cache)
    fork = cache.fork()
    go_on(cache, INTERVAL, seed=5)
    go_on(fork, INTERVAL, seed=6)
    return fork


@pytest.mark.parametrize("use", [steps, rows_end, other_rows, cropped, forked])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_kept_does_not_depend_on_it(name: str, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = use(read(POLICIES[name]))
    monkeypatch.setattr(Capture, "hold_back", hold_all)
    theirs = use(read(POLICIES[name]))
    assert ours.compressed_layers()[0].merged_tokens >= INTERVAL
    assert kept_of(ours) == kept_of(theirs)


def test_the_window_bounds_what_is_held() -> None:
    def most(scorer: RKV | H2O) -> int:
        cache, held = read(Policy(scorer, evict_interval=INTERVAL)), 0
        ask(cache)
        for step in range(INTERVAL):
            go_on(cache, 1, seed=step)
            for layer in cache.compressed_layers():
                if layer.capture.unread is not None:
                    held = max(held, layer.capture.unread.untyped_storage().nbytes())
        return held

    query_nbytes = len(LENGTHS) * 4 * attached("llama").config.head_dim * 4
    assert most(RKV(window=WINDOW)) == WINDOW * query_nbytes
    assert most(H2O()) == (INTERVAL - 1) * query_nbytes  # statistics read all


def test_a_row_whose_last_queries_are_gone_is_refused() -> None:
    """Cropped further than what is held, and padding comes then: its last tokens lie before those."""
    cache = read(POLICIES["rkv"])
    go_on(cache, INTERVAL - 1, seed=5)
    cache.crop(-2 * WINDOW)
    ids, mask = padded([tokens(1, length, seed=4)[0] for length in (WINDOW - 1, 2 * WINDOW + 1, 2 * WINDOW)], "right")
    with pytest.raises(UserError, match=r"^online eviction reads the last 4 queries .* fork the cache before tokens"):
        continuation(attached("llama"), ids, cache, mask)
