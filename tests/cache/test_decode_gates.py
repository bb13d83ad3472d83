"""What deployment costs, in bytes, waits and allocations: counted, so that it holds on any machine."""

import functools
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import HEURISTICS, LEARNED, attached, build, padded, policy_for, tokens
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.meters import Counts, Meter, nbytes, slope
from learnkv import CompressedCache, Policy, attach, generate, prefill
from learnkv.allocators import Allocator
from learnkv.ops.attention_columns import reference as columns
from learnkv.scorers import Knorm

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 128
ENTRY = 2 * DIM * 4  # bytes of a kept key and value
PROMPT = 1024


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read at once because it lies on the host."""
    monkeypatch.setattr("learnkv.core.finite.READ_AT_ONCE", set())


@functools.cache
def model() -> PreTrainedModel:
    """Heads as wide as real ones: logits are small beside keys then, as they are there."""
    sizes = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS * GROUP, "num_key_value_heads": HEADS}
    return attach(build("llama", head_dim=DIM, hidden_size=32, max_position_embeddings=4096, **sizes))


class OneHead(Allocator):
    """All that is left to one head of the model."""

    static = True

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        wanted = torch.zeros(scores.shape[:3], dtype=torch.float64)
        wanted[1, :, 1] = 1.0
        return wanted


POLICIES = {
    "uniform": functools.partial(policy_for, "snapkv"),
    "ragged": functools.partial(policy_for, "adakv"),
    "one dominant head": lambda _: Policy(Knorm(), OneHead(), sinks=1, recent=1),
}
every_layout = pytest.mark.parametrize("layout", POLICIES)


@functools.cache
def prompt(length: int, batch: int = 2) -> CompressedCache:
    return prefill(model(), tokens(batch, length))


def compressed(layout: str, budget: float, length: int = PROMPT) -> CompressedCache:
    return POLICIES[layout](model()).compress(prompt(length).fork(), budget=budget)


def per_step(cache: CompressedCache, question: Tensor, **settings: Any) -> Counts:
    """Counts of eight decode steps, start and end of a turn taken out; allocations are those of the longer turn."""
    runs = []
    for new in (4, 12):
        with Meter() as counts:
            generate(model(), question, cache.fork(), max_new_tokens=new, **settings)
        runs.append(counts)
    short, long = runs
    return Counts(
        long.nbytes - short.nbytes,
        long.kernels - short.kernels,
        long.ops - short.ops,
        long.waits - short.waits,
        long.storages[len(short.storages) :],
    )


@every_layout
def test_a_step_reads_the_bytes_that_were_kept(layout: str) -> None:
    budgets, steps = [384, 448, 512], 8
    caches = [compressed(layout, budget) for budget in budgets]
    kept = [int(cache.budgets.sum()) * ENTRY for cache in caches]
    moved = [per_step(cache, tokens(2, 3)).nbytes / steps for cache in caches]
    assert 1.0 <= slope(kept, moved) <= 1.05


def test_one_dominant_head_moves_no_more_than_equal_heads() -> None:
    ours, equal = (
        per_step(compressed(layout, 400), tokens(2, 3)).nbytes for layout in ("one dominant head", "uniform")
    )
    assert ours <= 1.05 * equal


@every_layout
def test_a_step_costs_the_same_after_a_longer_prompt(layout: str) -> None:
    short, long = (per_step(compressed(layout, 384, length), tokens(2, 3)) for length in (PROMPT, 2 * PROMPT))
    assert short.nbytes == long.nbytes
    assert short.kernels == long.kernels
    assert sum(short.storages) == sum(long.storages)


SETTINGS = {
    "greedy": {},
    "with an end": {"eos_token_id": [3, 4]},
    "drawn": {"do_sample": True, "top_k": 9, "top_p": 0.9, "seed": 1},
    "with a stop": {"stop": lambda said: OnDevice(torch.zeros(2, dtype=torch.bool))},
}


class OnDevice:
    """Answers [B] that lie on a device."""

    device = torch.device("cuda")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def to(self, device: torch.device) -> Tensor:
        return self.rows


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("lengths", [(3, 3), (3, 1)], ids=["questions alike", "questions padded"])
def test_a_step_waits_for_nothing_and_allocates_nothing_that_grows(
    settings: dict[str, Any], lengths: tuple[int, int]
) -> None:
    question, mask = padded([tokens(1, length)[0] for length in lengths])
    small, large = (
        per_step(compressed("ragged", budget), question, attention_mask=mask, **settings) for budget in (32, 160)
    )
    assert not small.waits
    assert not large.waits
    cache = compressed("ragged", 640)
    grown = sum(large.storages) - sum(small.storages)
    assert grown / 8 < 0.05 * int(cache.budgets.sum() - compressed("ragged", 384).budgets.sum()) * ENTRY
    assert large.largest < 0.05 * nbytes(cache.layers[0].segment.keys)


def test_one_host_sync_in_sixteen_steps() -> None:
    cache = compressed("uniform", 32)
    waits = []
    for new in (17, 33, 49):
        with Meter() as counts:
            generate(model(), tokens(2, 3), cache.fork(), max_new_tokens=new)
        waits.append(counts.waits["tolist"])
        assert set(counts.waits) == {"tolist"}
    assert waits == [2, 3, 4]


@pytest.mark.parametrize("name", HEURISTICS + LEARNED)
def test_compression_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read on the host are the tables of the references, of which a CPU has them there; kernels do not ask."""
    monkeypatch.setattr(columns, "_by_head", lambda total: False)  # as on a GPU; a CPU looks at positions
    policy = policy_for(name, attached("llama"))
    whole = prefill(attached("llama"), tokens(2, 90), policies=[policy])
    tables = 2 * 3
    with Meter() as counts:
        policy.compress(whole.fork(), keep=0.2)
    assert counts.waits == {"tolist": tables}
    with Meter() as counts:
        policy.relax(whole, keep=0.2)
    assert counts.waits["tolist"] == sum(counts.waits.values()) <= tables
    if policy.capture_spec.extra_passes:  # further passes over the prompt
        return
    with Meter() as counts:
        prefill(attached("llama"), tokens(2, 90), policy=policy, keep=0.2)
    # How much each layer gets, where a layer is evicted before the next one has read: of all at once, or of each.
    looks = policy.reads_once * (1 if policy.allocator.static else 3)
    assert counts.waits == {"tolist": tables + looks}


@pytest.mark.parametrize("layout", ["uniform", "ragged"])
def test_compression_makes_nothing_of_heads_by_window_by_slots(layout: str) -> None:
    """Temporaries of one layer's scores stay below four numbers per entry, those of selection over all layers too."""
    length, batch, window = 3072, 1, 32
    cache, policy = prompt(length, batch).fork(), POLICIES[layout](model())
    cache.seal()
    seen = cache.compressed_layers()[0].observation()
    assert seen.queries[:, :, -window:].shape[1:3] == (HEADS * GROUP, window)
    entries = batch * HEADS * length
    with Meter() as counts:
        policy.scorer(seen)
    assert 4 * entries < counts.largest < 16 * entries < 4 * GROUP * window * entries
    with Meter() as counts:
        policy.compress(cache, budget=64)
    assert counts.largest < 16 * LAYERS * entries


def test_nothing_as_long_as_the_prompt_is_alive_after_compression_but_its_ids() -> None:
    def left(length: int) -> list[int]:
        gc.collect()
        before = alive()
        cache = POLICIES["ragged"](model()).compress(prefill(model(), tokens(1, length)), budget=16)
        generate(model(), tokens(1, 3), cache, max_new_tokens=5)
        gc.collect()
        sizes = {address: size for address, size in alive().items() if address not in before}
        assert cache.token_ids is not None
        prompt = cache.token_ids[0].untyped_storage()
        assert sizes.pop(prompt.data_ptr()) == prompt.nbytes() == 8 * length  # one int64 per token
        return sorted(sizes.values())

    model()  # whose weights are not new
    short, long = left(300), left(600)
    assert short == long
    assert sum(short) >= 16 * LAYERS * HEADS * ENTRY


def alive() -> dict[int, int]:
    """Bytes of every storage that a Python object holds, by address."""
    held = [one.untyped_storage() for one in gc.get_objects() if type(one) is Tensor]
    return {one.data_ptr(): one.nbytes() for one in held}
