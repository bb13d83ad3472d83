"""Caches whose single tokens read entries chosen by their keys: what they read, alone and in batches."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.models import assert_logits_close, attached, padded, tokens
from support.tables import policy_of
from torch import Tensor

from learnkv import CompressedCache, continuation, generate, prefill
from learnkv.cache.entry_index import EntryIndex
from learnkv.errors import UserError
from learnkv.pages import DELTA, HeteroCache, Louver, SinkRouter
from learnkv.policy.policy import Policy
from learnkv.scorers import SnapKV

LAYERS, HEADS, GROUP = 3, 2, 2
KEEP = 0.5


def reading(name: str) -> Policy:
    """Policies whose every layer reads less than everything, where the method has such layers."""
    kinds = policy_of("heterocache_reload", LAYERS, HEADS, GROUP).pages.source
    selectors = {
        "delta": lambda: DELTA(page_size=4, recent_pages=1, dense_layers=0),
        "louver": lambda: Louver(sample=16, buffer=3),
        "louver-gap": lambda: Louver("sample_gap", sample=16, buffer=3),
        "sink_router": lambda: SinkRouter(dense_layers=0, window=16),
        "heterocache": lambda: HeteroCache(kinds, interval=3, stable=0.9),
        "heterocache-original": lambda: HeteroCache(kinds, interval=3, stable=1.0, loading="original"),
    }
    return Policy(None, pages=selectors[name]())


NAMES = ["delta", "louver", "louver-gap", "sink_router", "heterocache", "heterocache-original"]
every_method = pytest.mark.parametrize("name", NAMES)


def run(cache: CompressedCache, ids: Tensor) -> Tensor:
    return torch.cat([continuation(attached("llama"), one, cache) for one in ids.split(1, 1)], 1)


def read(name: str, rows: Sequence[Tensor], chunk_size: int | None = None) -> CompressedCache:
    policy = reading(name)
    return policy.compress(
        prefill(attached("llama"), *padded(rows), policies=[policy], chunk_size=chunk_size), keep=KEEP
    )


@every_method
def test_less_than_everything_is_read_and_nothing_is_freed(name: str) -> None:
    policy, model = reading(name), attached("llama")
    whole = prefill(model, tokens(1, 60), policies=[policy])
    cache = policy.compress(whole.fork(), keep=KEEP)
    assert cache.spent == [1.0]
    ids = tokens(1, 9, seed=2)
    logits = run(cache, ids)
    assert 0.1 < cache.read[0] < 1
    assert cache.nbytes >= whole.nbytes
    everything = whole.fork()
    everything.seal()
    assert (logits - run(everything, ids)).abs().max() > 1e-3
    assert_logits_close(run(policy.compress(whole.fork(), keep=1.0), ids), logits_of(ids))


def logits_of(ids: Tensor) -> Tensor:
    cache = prefill(attached("llama"), tokens(1, 60))
    cache.seal()
    return run(cache, ids)


@every_method
def test_a_batch_is_every_row_alone_however_it_was_read(name: str) -> None:
    """Prompts and questions of different lengths, then single tokens."""
    model = attached("llama")
    prompts = [tokens(1, n, seed=4)[0] for n in (50, 37, 26)]
    questions, more = [tokens(1, n, seed=5)[0] for n in (6, 2, 3)], tokens(3, 8, seed=6)
    together = read(name, prompts, chunk_size=11)
    continuation(model, *padded(questions, "right")[:1], together, padded(questions, "right")[1])
    logits = run(together, more)
    for row in range(3):
        alone = read(name, prompts[row : row + 1])
        continuation(model, questions[row].unsqueeze(0), alone)
        assert_logits_close(logits[row], run(alone, more[row : row + 1])[0])
        assert together.read[row] == pytest.approx(alone.read[0], abs=1e-6)


@every_method
def test_forks_are_independent_and_beams_share_the_prompt(name: str) -> None:
    model, said = attached("llama"), tokens(2, 6, seed=7)
    prompts = list(tokens(2, 40))
    alone = run(read(name, prompts), said)
    first = read(name, prompts)
    run(first, said[:, :2])
    twin = first.fork()
    run(twin, tokens(2, 9, seed=8))
    assert torch.equal(run(first, said[:, 2:]), alone[:, 2:])
    searched = generate(model, said[:, :3], read(name, prompts), max_new_tokens=6, num_beams=2)
    rows = [
        generate(model, said[row : row + 1, :3], read(name, [prompts[row]]), max_new_tokens=6, num_beams=2)
        for row in range(2)
    ]
    assert torch.equal(searched, torch.cat(rows))


def lists(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """What every layer chooses from now on."""
    chosen: list[Tensor | None] = []
    choose = EntryIndex.choose

    def record(self: EntryIndex, *args: Any) -> Any:
        pages = choose(self, *args)
        chosen.append(None if pages is None else pages.numbers)
        return pages

    monkeypatch.setattr(EntryIndex, "choose", record)
    return chosen


def test_layers_after_a_full_one_read_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = lists(monkeypatch)
    cache = read("delta", [tokens(1, 60)[0]])
    run(cache, tokens(1, 2))
    assert [part is None for part in chosen] == [True, False, False] * 2
    assert torch.equal(chosen[1], chosen[2])
    assert (chosen[1] >= 0).sum(-1).tolist() == [30 // 4] * 2
    assert cache.read == pytest.approx([(1 + 2 * (6 * 4) / 60) / 3])  # the last page holds the new tokens


def test_a_threshold_s_budget_is_about_what_is_read() -> None:
    policy = Policy(None, pages=Louver(sample=512))
    cache = policy.compress(prefill(attached("llama"), tokens(1, 200)), keep=0.2)
    run(cache, tokens(1, 20, seed=2))
    assert cache.read == pytest.approx([0.2], abs=0.01)


def test_a_head_that_looks_at_the_first_token_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = lists(monkeypatch)
    cache = read("sink_router", [tokens(1, 60)[0]])
    run(cache, tokens(1, 12, seed=3))
    counts = torch.stack([(part >= 0).sum(-1) for part in chosen if part is not None])
    assert {int(count) == 0 or int(count) > 60 for count in counts.flatten()} == {True}
    assert 0 < (counts == 0).double().mean() < 1
    fixed = Policy(None, pages=SinkRouter(dense_layers=0, cubic=[2.0, 0.0, 0.0, 0.0]))  # no cosine is above 2
    whole = prefill(attached("llama"), tokens(1, 60), policies=[fixed])
    ids = tokens(1, 3, seed=2)
    assert_logits_close(run(fixed.compress(whole, keep=0.5), ids), logits_of(ids))


@pytest.mark.parametrize("name", ["delta", "sink_router", "heterocache"])
def test_heads_that_hold_a_part_of_the_prompt_are_refused(name: str) -> None:
    selector = reading(name).pages
    with pytest.raises(UserError, match=r"pages=\w+: expected a policy without a scorer"):
        Policy(SnapKV(), pages=selector, read=0.5)
    with pytest.raises(UserError, match=r"pages=\w+: expected heads that hold the whole prompt"):
        Policy(SnapKV(window=8)).compress(read(name, [tokens(1, 40)[0]]), keep=0.5)


def test_thresholds_serve_what_another_policy_has_left() -> None:
    policy = Policy(SnapKV(window=8), pages=Louver(sample=8), read=0.5)
    cache = policy.compress(prefill(attached("llama"), tokens(1, 60)), keep=0.5)
    assert cache.spent == [0.5]
    run(cache, tokens(1, 6))
    assert 0.1 < cache.read[0] < 0.45


def test_heads_that_would_read_everything_share_a_budget_that_does_not_hold_them() -> None:
    policy = reading("heterocache")
    cache = policy.compress(prefill(attached("llama"), tokens(1, 40), policies=[policy]), keep=0.1)
    run(cache, tokens(1, 2))
    assert cache.read[0] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: DELTA(page_size=0), "page_size=0"),
        (lambda: DELTA(dense_layers=1, full_layers=[2]), "full_layers"),
        (lambda: Louver(fraction=0), "fraction=0"),
        (lambda: Louver(sample=0), "sample=0"),
        (lambda: SinkRouter(window=0), "window=0"),
        (lambda: SinkRouter(cubic=[1.0]), "cubic"),
    ],
)
def test_wrong_numbers_are_named(build: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        build()


@pytest.mark.parametrize("name", ["delta", "louver", "sink_router", "heterocache_reload"])
def test_the_shipped_files_are_reading_methods(name: str) -> None:
    policy = policy_of(name, LAYERS, HEADS, GROUP)
    assert policy.scorer is None
    assert policy.pages is not None
    with pytest.raises(UserError, match="expected a policy without pages"):
        policy.check_spend(None, None, "1MB")
