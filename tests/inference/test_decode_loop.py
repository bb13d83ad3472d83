"""Decode steps: nothing waits, nothing moves, and a turn leaves behind what token-by-token reading leaves behind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import attached, build, padded, policy_for, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learnkv import CompressedCache, attach, continuation, generate, prefill
from learnkv.inference.decode_loop import WARM_UP, DecodeLoop

DRAWN = {"do_sample": True, "temperature": 1.4, "top_k": 20, "top_p": 0.9, "seed": 5}
WAYS = pytest.mark.parametrize("way", [{}, DRAWN], ids=["greedy", "drawn"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[DecodeLoop]:
    """The loops whose step is captured, one entry per capture; a replay computes the step again."""
    loops: list[DecodeLoop] = []

    def capture(
        step: Callable[..., Any], device: torch.device, generator: torch.Generator | None
    ) -> Callable[..., Any]:
        loops.append(step.__self__)
        return step

    monkeypatch.setattr("learnkv.inference.decode_loop.capture", capture)
    monkeypatch.setattr("learnkv.inference.decode_loop.refusal", lambda *_: None)
    monkeypatch.setattr("learnkv.inference.decode_loop.WORTH_CAPTURING", 0)
    return loops


def compressed(*lengths: int, family: str = "llama") -> CompressedCache:
    prompts = [tokens(1, length, seed=at)[0] for at, length in enumerate(lengths)]
    return policy_for("adakv", attached(family)).compress(prefill(attached(family), *padded(prompts)), keep=0.4)


def one_by_one(question: Tensor, cache: CompressedCache, new: int, ends: list[int], pad: int) -> list[list[int]]:
    """Greedy answers up to and with their end, by single tokens of single rows."""
    answers: list[Any] = []
    for row in range(len(question)):
        alone, ids = cache.fork(), question[row : row + 1]
        alone.batch_select_indices(torch.tensor([row]))
        answers.append([])
        while len(answers[-1]) < new and (not answers[-1] or answers[-1][-1] not in ends):
            answers[-1].append(int(continuation(attached("llama"), ids, alone)[0, -1].argmax()))
            ids = torch.tensor([answers[-1][-1:]])
    longest = max(map(len, answers))
    return [one + [pad] * (longest - len(one)) for one in answers]


def left_behind(cache: CompressedCache) -> list[Tensor]:
    """All tensors that a turn leaves in the cache; slots of padding are not compared."""
    mask = cache.tail_mask[:, None, :, None]
    tails = [part.masked_fill(~mask, 0) for tail in cache.tails() for part in (tail.keys, tail.values)]
    return [*tails, cache.tail_mask, *cache.pending, cache.next_positions()]


def assert_left_alike(one: CompressedCache, other: CompressedCache) -> None:
    assert one.tail_length == other.tail_length
    for ours, theirs in zip(left_behind(one), left_behind(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def ending_early(cache: CompressedCache, question: Tensor) -> list[int]:
    """Ends at which one row stops after a few tokens and the other somewhat later, both long before a check."""
    free = generate(attached("llama"), question, cache.fork(), max_new_tokens=12).tolist()
    return [free[0][3], free[1][7]]


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_end_between_two_checks(static: bool, request: pytest.FixtureRequest) -> None:
    if static:
        request.getfixturevalue("captured")
    cache, question = compressed(40, 31), tokens(2, 5, seed=3)
    ends = ending_early(cache, question)
    told = one_by_one(question, cache, 40, ends, pad=0)
    longest = len(told[0])
    assert 4 <= longest < 16
    assert len({row.count(0) for row in told}) == 2
    ours, exact = cache.fork(), cache.fork()
    settings = {"eos_token_id": ends, "pad_token_id": 0}
    assert generate(attached("llama"), question, ours, max_new_tokens=40, **settings).tolist() == told
    # A turn of exactly as many tokens runs no step beyond the end.
    assert generate(attached("llama"), question, exact, max_new_tokens=longest, **settings).tolist() == told
    assert ours.tail_length == 5 + longest - 1
    assert_left_alike(ours, exact)
    assert ours.tail_mask[:, 5:].sum(-1).tolist() == [min(len(row) - row.count(0), longest - 1) for row in told]
    more = tokens(2, 3, seed=4)
    assert torch.equal(*(generate(attached("llama"), more, one, max_new_tokens=20) for one in (ours, exact)))


@pytest.mark.parametrize(("end", "runs"), [(0, 1), (1, 17), (16, 17), (17, 30)])
def test_the_model_runs_to_the_next_check_and_no_further(end: int, runs: int) -> None:
    model, seen = attach(build("llama")), []
    cache, question = prefill(model, tokens(2, 30)), tokens(2, 4)
    model.register_forward_hook(lambda *_: seen.append(0))

    def stop(generated: Tensor) -> OnDevice:
        return OnDevice(torch.full((2,), generated.shape[1] > end))

    said = generate(model, question, cache, max_new_tokens=30, stop=stop)
    assert said.shape[1] == end + 1
    assert len(seen) == runs
    assert cache.tail_length == 4 + end


class OnDevice:
    """A bool tensor [B] that says that it is not on the host."""

    device = torch.device("cuda")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def to(self, device: torch.device) -> Tensor:
        return self.rows


@WAYS
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)])
def test_static_steps_generate_the_same_tokens(
    way: dict[str, Any], lengths: tuple[int, int], captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, questions = attached("llama"), [tokens(1, length, seed=6)[0] for length in lengths]
    turns = [padded(questions, "right"), (tokens(2, 3, seed=7), None), (tokens(2, 2, seed=8), None)]
    ours, theirs = compressed(50, 33), compressed(50, 33)
    said = [generate(model, ids, ours, mask, max_new_tokens=11, **way) for ids, mask in turns]
    assert len(captured) == 1
    with monkeypatch.context() as eager:
        eager.setattr("learnkv.inference.decode_loop.refusal", lambda *_: "asked not to")
        told = [generate(model, ids, theirs, mask, max_new_tokens=11, **way) for ids, mask in turns]
    assert len(captured) == 1
    for one, other in zip(said, told, strict=True):
        assert torch.equal(one, other)
    assert_left_alike(ours, theirs)


def test_a_graph_is_captured_again_only_when_rows_or_tails_move(captured: list[Any]) -> None:
    model, cache, question = attached("llama"), compressed(40, 31), tokens(2, 5)

    def captures(cache: CompressedCache, **settings: Any) -> int:
        before = len(captured)
        generate(model, question[: len(cache.prompt_lengths)], cache, **{"max_new_tokens": 9, **settings})
        return len(captured) - before

    assert captures(cache, max_new_tokens=WARM_UP + 1) == 0  # nothing but warm-up
    assert captures(cache) == 1
    assert captures(cache) == 0
    assert captures(cache) == 0
    assert captures(cache, graph=False) == 0
    fork = cache.fork()
    assert captures(cache) == 1  # a tail that is shared is left behind
    assert captures(fork) == 1
    assert captures(cache) == captures(fork) == 0
    assert captures(fork, max_new_tokens=80) == 1  # grows
    assert captures(fork) == 0
    assert captures(fork, do_sample=True) == 1
    fork.batch_select_indices(torch.tensor([1]))
    assert captures(fork) == 1
    fork.crop(-20)
    assert captures(fork) == 0


def test_a_graph_is_captured_when_it_has_something_to_repeat(
    captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learnkv.inference.decode_loop.WORTH_CAPTURING", 16)
    model, question = attached("llama"), tokens(2, 3)

    def captures(*turns: int) -> list[int]:
        cache = compressed(40, 31)
        return [generate(model, question, cache, max_new_tokens=new) is not None and len(captured) for new in turns]

    assert captures(16) == [0]
    assert captures(17) == [1]
    assert captures(9, 8, 2, 9) == [1, 1, 2, 2]  # the second turn's eighth step is the sixteenth of these buffers


class Trace(TorchDispatchMode):
    """Every operation with its shapes, and where its arguments lie unless the step made them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []
        self.made: list[Tensor] = []  # held, so that no address is used twice

    def __torch_dispatch__(
        self, func: Any, types: tuple[type[Any], ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> int | Tensor | tuple[Tensor, Tensor]:
        result = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        own = {one.untyped_storage().data_ptr() for one in self.made}
        places = [one.data_ptr() for one in given if one.untyped_storage().data_ptr() not in own]
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        known = {one.untyped_storage().data_ptr() for one in given}
        self.made += [one for one in made if one.untyped_storage().data_ptr() not in known]
        self.seen.append((str(func), [tuple(one.shape) for one in (*given, *made)], places))
        return result


@WAYS
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)])
def test_a_static_step_repeats_itself_and_leaves_the_host_alone(
    way: dict[str, Any], family: str, lengths: tuple[int, int], captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operations on the same places, whatever is said: what a graph of one step relies on."""
    traces, states, cache = [], [], compressed(50, 33, family=family)
    step = DecodeLoop._step

    def traced(self: DecodeLoop) -> None:
        with Trace() as trace:
            step(self)
        traces.append(trace.seen)
        states.append(
            [(tail.length, layer.prompt_slots) for tail, layer in zip(cache.tails(), cache.layers, strict=True)]
        )

    monkeypatch.setattr(DecodeLoop, "_step", traced)
    # A kernel knows no rows that are too short for a call of their own.
    monkeypatch.setattr("learnkv.ops.decode_attention.reference._WORTH_A_CALL", 0)
    questions = padded([tokens(1, length, seed=6)[0] for length in lengths], "right")
    generate(attached(family), questions[0], cache, questions[1], max_new_tokens=7, eos_token_id=3, **way)
    assert len(traces) == 6
    assert len(captured) == 1
    assert all(trace == traces[0] for trace in traces[1:])
    assert all(state == states[0] for state in states[1:])
    waits = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.lift_fresh.default"}
    assert not waits & {name for name, *_ in traces[0]}


def test_a_turn_that_fails_leaves_a_cache_that_goes_on(captured: list[Any]) -> None:
    model, cache = attached("llama"), compressed(40, 31)
    fresh, question = cache.fork(), tokens(2, 5)
    generate(model, question, fresh, max_new_tokens=1)

    def stop(generated: Tensor) -> Tensor:
        if generated.shape[1] == 5:
            raise KeyboardInterrupt
        return torch.zeros(2, dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        generate(model, question, cache, max_new_tokens=9, stop=stop)
    cache.crop(5 - cache.tail_length)
    fresh.pending = None
    assert torch.equal(*(generate(model, question, one, max_new_tokens=4) for one in (cache, fresh)))
