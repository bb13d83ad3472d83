"""Caches whose single tokens read chosen pages: what they read, what they hold, and that all else is as before."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.models import assert_logits_close, attached, padded, tokens
from torch import Tensor

from learnkv import continuation, generate, load_policy, prefill
from learnkv.allocators import AdaKV
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.ops.arguments import Pages, Ragged, Tail, Tier
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.pages import Quest
from learnkv.policy.policy import Policy
from learnkv.scorers import SnapKV

PAGE = 4


def quest(**more: Any) -> Policy:
    return Policy(None, pages=Quest(**{"page_size": PAGE, "dense_layers": 0, **more}))


@pytest.fixture
def page_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of all attention to pages from now on."""
    recorded: list[dict[str, Any]] = []

    def record(
        query: Tensor,
        kept: Ragged,
        tail: Tail,
        scaling: float,
        pages: Pages | None = None,
        tiers: Sequence[Tier] = (),
        terms: SoftmaxTerms = NO_TERMS,
        **settings: Any,
    ) -> tuple[Tensor, Tensor]:
        if pages is not None:
            step = {"keys": kept.keys, "offset": kept.offset, "length": kept.length, "tail": tail.keys}
            step |= {"mask": tail.mask, "pages": pages.numbers}
            recorded.append(
                {name: None if value is None else value.clone() for name, value in step.items()} | {"query": query}
            )
        return decode_attention(query, kept, tail, scaling, pages, tiers, terms, **settings)

    monkeypatch.setattr("learnkv.cache.states.decode_attention", record)
    return recorded


def expected(step: dict[str, Any], tokens: list[int]) -> list[list[int]]:
    """Pages of every kv head, from all keys that are there, by the rule of the kernels."""
    found = []
    query, tail = step["query"], step["tail"]
    for row in range(len(step["offset"])):
        b, h = divmod(row, tail.shape[1])
        begin = int(step["offset"][row])
        seen = slice(None) if step["mask"] is None else step["mask"][b, 0, 0]
        keys = torch.cat([step["keys"][begin : begin + int(step["length"][row])], tail[b, h][seen]])
        parts = keys.split(PAGE)
        group = query[b].unflatten(0, (tail.shape[1], -1))[h, :, 0]
        bounds = [torch.maximum(group * part.amin(0), group * part.amax(0)).sum(-1).max() for part in parts]
        best = sorted(range(len(parts) - 1), key=lambda page: -bounds[page])
        found.append(sorted([*best[: max(tokens[b] // PAGE, 1) - 1], len(parts) - 1]))
    return found


def check_steps(page_steps: list[dict[str, Any]], tokens: list[int]) -> None:
    for step in page_steps:
        assert [[page for page in row if page >= 0] for row in step["pages"].tolist()] == expected(step, tokens)


def test_every_step_reads_the_pages_that_all_keys_give(page_steps: list[Any]) -> None:
    """Two turns of a batch with padding in prompts and questions, a row that ends early, more tokens than a tail holds
    at first, and a crop in between."""
    model, prompts = attached("llama"), [tokens(1, n, seed=1)[0] for n in (53, 30)]
    cache = quest().compress(prefill(model, *padded(prompts)), keep=0.3)
    tokens_read = [16, 9]
    ids, mask = padded([tokens(1, n, seed=2)[0] for n in (5, 2)], "right")
    generate(model, ids, cache, mask, max_new_tokens=9, stop=lambda said: torch.tensor([False, said.shape[1] > 3]))
    check_steps(page_steps, tokens_read)
    assert len(page_steps) == 8 * 3
    page_steps.clear()
    ids, mask = padded([tokens(1, n, seed=3)[0] for n in (1, 4)], "right")
    generate(model, ids, cache, mask, max_new_tokens=70)
    check_steps(page_steps, tokens_read)
    page_steps.clear()
    cache.crop(-5)
    cache.tail_mask = cache.tail_mask[:, : cache.tail_length]
    continuation(model, tokens(2, 1), cache)
    continuation(model, tokens(2, 1), cache)
    check_steps(page_steps, tokens_read)
    assert len(page_steps) == 2 * 3


def test_reading_everything_is_the_full_cache() -> None:
    model, prompt, question = attached("qwen2"), tokens(2, 45), tokens(2, 3)
    whole = prefill(model, prompt)
    said = generate(model, question, whole.fork(), max_new_tokens=12)
    for spend in ({"budget": 45}, {"budget": 1000}, {"keep": 1.0}):
        cache = quest().compress(whole.fork(), **spend)
        assert cache.read == [1.0, 1.0]
        assert torch.equal(generate(model, question, cache, max_new_tokens=12), said)
    other = quest().compress(whole.fork(), keep=0.1)
    assert not torch.equal(generate(model, question, other, max_new_tokens=12), said)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_batch_is_every_row_alone(family: str) -> None:
    """Single tokens after questions of different lengths, also where page boundaries differ from row to row."""
    model = attached(family)
    prompts = [tokens(1, n, seed=4)[0] for n in (50, 37, 21)]
    questions = [tokens(1, n, seed=5)[0] for n in ((4, 4, 4) if family == "gemma3" else (6, 2, 3))]
    more = tokens(3, 7, seed=6)

    def run(policy: Policy, prompts: list[Tensor], questions: list[Tensor], more: Tensor) -> Tensor:
        cache = policy.compress(prefill(model, *padded(prompts)), keep=0.35)
        continuation(model, *padded(questions, "right")[:1], cache, padded(questions, "right")[1])
        return torch.cat([continuation(model, one, cache) for one in more.split(1, 1)], 1)

    for policy in (quest(), quest(rule="accuracy", group_reduce="none"), load_policy("quest")):
        together = run(policy, prompts, questions, more)
        for row in range(3):
            alone = run(policy, prompts[row : row + 1], questions[row : row + 1], more[row : row + 1])
            assert_logits_close(together[row], alone[0])


def bounds_nbytes(cache: CompressedCache) -> int:
    return sum(layer.page_index.bounds.nbytes + layer.page_index.tokens.nbytes for layer in cache.compressed_layers())


def test_nothing_is_freed_and_the_bounds_are_counted() -> None:
    model = attached("llama")
    whole = prefill(model, tokens(2, 100))
    whole.seal()
    cache = quest().compress(whole.fork(), keep=0.25)
    assert cache.spent == [1.0, 1.0]
    assert cache.read == [0.24, 0.24]
    assert cache.nbytes == whole.nbytes + bounds_nbytes(cache)
    pages = -(-(100 + 64) // PAGE)
    assert bounds_nbytes(cache) == 3 * (2 * 2 * 2 * pages * 16 * 4 + 16)
    assert cache.kept_positions(1, 1, 1).tolist() == list(range(100))


def test_layers_that_read_everything_count_as_such() -> None:
    cache = quest(dense_layers=2).compress(prefill(attached("llama"), tokens(1, 100)), keep=0.2)
    assert cache.read == pytest.approx([(2 + 0.2) / 3])
    assert [layer.page_index is None for layer in cache.compressed_layers()] == [True, True, False]


def test_forks_are_independent() -> None:
    model, whole = attached("llama"), prefill(attached("llama"), tokens(2, 40))
    said = tokens(2, 6, seed=7)

    def run(cache: CompressedCache, ids: Tensor) -> Tensor:
        return torch.cat([continuation(model, one, cache) for one in ids.split(1, 1)], 1)

    alone = run(quest().compress(whole.fork(), keep=0.3), said)
    first = quest().compress(whole.fork(), keep=0.3)
    run(first, said[:, :2])
    twin = first.fork()
    run(twin, tokens(2, 9, seed=8))
    assert torch.equal(run(first, said[:, 2:]), alone[:, 2:])
    assert whole.read == [1.0, 1.0]


@pytest.mark.compat
def test_beams_and_transformers_own_generate() -> None:
    model, prompt, question = attached("llama"), tokens(2, 40), tokens(2, 3)
    whole = quest().compress(prefill(model, prompt), keep=0.3)
    ours = generate(model, question, whole.fork(), max_new_tokens=8)
    theirs = model.generate(
        input_ids=torch.cat([prompt, question], 1), past_key_values=whole.fork(), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(theirs[:, 43:], ours)
    searched = generate(model, question, whole.fork(), max_new_tokens=8, num_beams=3)
    rows = [
        generate(model, question[at : at + 1], one, max_new_tokens=8, num_beams=3)
        for at, one in enumerate(quest().compress(prefill(model, row[None]), keep=0.3) for row in prompt)
    ]
    assert torch.equal(searched, torch.cat(rows))


def test_pages_of_an_evicted_cache(page_steps: list[Any]) -> None:
    """Ragged heads, some with less than a step may read; in one policy, or one after the other."""
    model = attached("llama")
    whole = prefill(model, tokens(2, 60), window=16)
    both = Policy(SnapKV(window=16), AdaKV(), pages=Quest(PAGE, dense_layers=0), read=0.75)
    cache = both.compress(whole.fork(), keep=0.2)
    assert cache.spent == [0.2, 0.2]
    assert cache.budgets.min() == 9
    assert cache.budgets.max() == 15
    assert cache.read == pytest.approx([8 / 60, 8 / 60])
    said = generate(model, tokens(2, 3), cache, max_new_tokens=6)
    check_steps(page_steps, [9, 9])
    page_steps.clear()
    evicted = Policy(SnapKV(window=16), AdaKV()).compress(whole.fork(), keep=0.2)
    again = quest().compress(evicted.fork(), keep=0.15)
    assert again.read == cache.read
    assert torch.equal(generate(model, tokens(2, 3), again, max_new_tokens=6), said)
    check_steps(page_steps, [9, 9])
    wide = quest().compress(evicted, keep=0.2)
    some = wide.budgets.clamp(max=12).sum((0, 2)) / (60 * 6)  # a head of nine has no twelve to read
    assert wide.read == pytest.approx(some.tolist())
    assert min(wide.read) < 0.2


def test_pages_of_a_cache_that_evicts_while_it_is_added_to(page_steps: list[Any]) -> None:
    """The tail of 8 slots is joined to the segment time and again; pages are those of what is held then."""
    model = attached("llama")
    policy = Policy(SnapKV(window=4), AdaKV(), evict_interval=8, pages=Quest(PAGE, dense_layers=0), read=0.5)
    cache = policy.compress(prefill(model, tokens(2, 60), window=16), keep=0.5)
    generate(model, tokens(2, 3), cache, max_new_tokens=30)
    check_steps(page_steps, [15, 15])
    assert len(page_steps) == 29 * 3
    assert len({tuple(step["length"].tolist()) for step in page_steps}) == 3  # the heads' budgets stay, layer by layer
    assert max(step["tail"].shape[2] for step in page_steps) <= 8


def test_an_eviction_under_pages_keeps_them(page_steps: list[Any]) -> None:
    model = attached("llama")
    cache = quest().compress(prefill(model, tokens(1, 60), window=16), keep=0.25)
    Policy(SnapKV(window=16)).compress(cache, keep=0.5)
    assert cache.spent == [0.5]
    assert cache.read == pytest.approx([0.2])
    continuation(model, tokens(1, 1), cache)
    check_steps(page_steps, [15])


@pytest.mark.parametrize(
    ("parts", "read"),
    [
        ({"scorer": None, "pages": Quest()}, 0.5),
        ({"scorer": SnapKV(), "pages": Quest()}, None),
        ({"scorer": SnapKV()}, 0.5),
        ({"scorer": SnapKV(), "pages": Quest()}, 1.5),
        ({"scorer": SnapKV(), "pages": Quest()}, 0.0),
    ],
)
def test_the_fraction_read_is_given_once(parts: dict[str, Any], read: float | None) -> None:
    with pytest.raises(UserError, match=r"read="):
        Policy(**parts, read=read)


def test_reading_is_not_trained() -> None:
    with pytest.raises(UserError, match="pages"):
        quest().relax(prefill(attached("llama"), tokens(1, 20)), keep=0.5)


def test_a_step_reads_the_bytes_of_its_pages(page_steps: list[Any]) -> None:
    """Of 400 entries a step at keep=0.1 gathers 40 per head, and the bounds."""
    read: list[int] = []
    model = attached("llama")
    cache = quest().compress(prefill(model, tokens(1, 400)), keep=0.1)
    continuation(model, tokens(1, 1), cache)
    for step in page_steps:
        assert step["pages"].shape == (2, 10)
        read.append(int((step["pages"] >= 0).sum()) * PAGE)
    assert read == [2 * 40] * 3


def held(cache: CompressedCache) -> list[Tensor]:
    return [layer.page_index.bounds for layer in cache.compressed_layers()]


def test_bounds_are_not_copied_from_step_to_step() -> None:
    model = attached("llama")
    cache = quest().compress(prefill(model, tokens(1, 40)), keep=0.3)
    before = [one.data_ptr() for one in held(cache)]
    for one in tokens(1, 60).split(1, 1):
        continuation(model, one, cache)
    assert [one.data_ptr() for one in held(cache)] == before
