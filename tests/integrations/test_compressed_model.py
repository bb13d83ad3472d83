"""Likelihoods and answers after compressed contexts: those of the model where all is kept, else those under masks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import attached, kept_mask, oracle, padded, plain, policy_for, tokens
from torch import Tensor

from learnkv import load_policy, prefill
from learnkv.errors import UserError
from learnkv.integrations.compressed_model import CompressedModel, Request

CONTEXTS = [tokens(1, length)[0].tolist() for length in (61, 40, 61)]
CONTEXTS[2][-1] += 1 if CONTEXTS[2][-1] < 90 else -1  # shares all but its last token with the first
CONTINUATIONS = [tokens(1, length, seed=2)[0].tolist() for length in (1, 3, 7)]
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def compressor(keep: float = 0.25, name: str = "adakv", **keys: Any) -> CompressedModel:
    model = attached("llama")
    return CompressedModel(model, policy_for(name, model), {"keep": keep}, **keys)


def choices() -> list[Request]:
    """Three continuations of three contexts."""
    return [Request(c + ids, len(ids), len(c) - 1) for ids in CONTINUATIONS for c in CONTEXTS]


def windows() -> list[Request]:
    """Windows whose tokens are all scored but the first, and one of which only the last tokens are."""
    whole = [Request(ids, len(ids) - 1, (len(ids) - 1) // 2) for ids in CONTEXTS]
    return [*whole, Request(CONTEXTS[0], 9, 30)]


def likelihoods(logits: Tensor, request: Request) -> Tensor:
    wanted = torch.tensor(request.ids[-request.count :])
    return logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1))[:, 0]


def dense(request: Request) -> Tensor:
    return likelihoods(plain("llama")(torch.tensor([request.ids[:-1]])).logits[0, -request.count :], request)


def masked(request: Request, keep: float, name: str = "adakv") -> Tensor:
    """By a dense model with the entries masked that the policy evicts of the context alone."""
    policy, context = policy_for(name, attached("llama")), torch.tensor(request.ids[: request.cut])
    cache = policy.compress(prefill(attached("llama"), context[None], policies=[policy]), keep=keep)
    after = oracle("llama")(context, kept_mask(cache, 0), torch.tensor(request.ids[request.cut : -1]))
    before = plain("llama")(context[None]).logits[0]
    return likelihoods(torch.cat([before, after])[-request.count :], request)


@pytest.mark.parametrize("requests", [choices(), windows()], ids=["choices", "windows"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_keeping_everything_is_the_model(requests: list[Request], batch_size: int) -> None:
    found = dict(compressor(1.0).logits(requests, batch_size))
    assert sorted(found) == [*range(len(requests))]
    for number, request in enumerate(requests):
        torch.testing.assert_close(likelihoods(found[number], request), dense(request), **CLOSE)


@pytest.mark.parametrize("requests", [choices(), windows()], ids=["choices", "windows"])
@pytest.mark.parametrize("name", ["adakv", "snapkv", "kvzip"])
def test_evicting_is_masking(requests: list[Request], name: str) -> None:
    for number, logits in compressor(0.25, name).logits(requests, 4):
        expected = masked(requests[number], 0.25, name)
        torch.testing.assert_close(likelihoods(logits, requests[number]), expected, **CLOSE)
        late = slice(requests[number].within_context, None)
        assert (expected[late] - dense(requests[number])[late]).abs().max() > 1e-2  # compression can be seen


def test_the_first_token_of_a_continuation_is_read_from_the_compressed_cache() -> None:
    one = Request(CONTEXTS[0] + CONTINUATIONS[0], 1, len(CONTEXTS[0]) - 1)
    ((_, logits),) = compressor(0.1).logits([one], 1)
    assert (likelihoods(logits, one) - dense(one)).abs() > 1e-2


def test_continuations_share_the_prefill_of_their_context() -> None:
    made = compressor()
    list(made.logits(choices(), 8))
    assert made.usage.contexts == 2  # two of the three differ in the token that is not compressed
    assert made.usage.spent == pytest.approx([0.25] * 2, abs=0.01)
    assert 0.2 < made.usage.nbytes / made.usage.full_nbytes < 0.35  # positions and tables beside a quarter


@pytest.mark.parametrize("name", ["h2o_decode", "rkv_decode", "quest"])
def test_a_request_of_a_batch_is_the_request_alone(name: str) -> None:
    model, policy = attached("llama"), load_policy(name)
    policy.evict_interval = min(policy.evict_interval, 4)
    found = dict(CompressedModel(model, policy, {"keep": 0.3}).logits(choices(), 8))
    for number, request in enumerate(choices()):
        ((_, alone),) = CompressedModel(model, policy, {"keep": 0.3}).logits([request], 1)
        torch.testing.assert_close(likelihoods(found[number], request), likelihoods(alone, request), **CLOSE)


def test_contexts_that_are_too_short_are_named_before_anything_is_computed() -> None:
    short = Request(CONTEXTS[0][:8], 3, 4)
    with pytest.raises(UserError, match=r"contexts of 4 tokens and more, whole_below=1: keep=0\.1: leaves"):
        next(compressor(0.1).logits([*choices(), short], 8))
    made = compressor(0.25, whole_below=5)
    found = dict(made.logits([*choices(), short], 8))
    torch.testing.assert_close(likelihoods(found[9], short), dense(short), **CLOSE)
    assert (made.usage.contexts, made.usage.contexts_whole) == (2, 1)


def test_one_token_has_nothing_to_compress() -> None:
    made, request = compressor(0.1), Request(CONTEXTS[0][:6], 5, 0)
    ((_, logits),) = made.logits([request], 1)
    torch.testing.assert_close(likelihoods(logits, request), dense(request), **CLOSE)


def greedy(context: list[int], new: int, keep: float) -> list[int]:
    """Token by token from the model, of whose context all but the last token is masked as the policy evicts it."""
    ids = [*context]
    for _ in range(new):
        policy, prefix = policy_for("adakv", attached("llama")), torch.tensor(context[:-1])
        cache = policy.compress(prefill(attached("llama"), prefix[None], policies=[policy]), keep=keep)
        ids.append(int(oracle("llama")(prefix, kept_mask(cache, 0), torch.tensor(ids[len(prefix) :]))[-1].argmax()))
    return ids[len(context) :]


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_answers_are_those_of_the_model_under_the_mask(keep: float) -> None:
    rows = [CONTEXTS[0], CONTEXTS[1], [5]]
    ids, mask = padded([torch.tensor(row) for row in rows])
    never, settings = lambda new: torch.zeros(len(new), dtype=torch.bool), {"do_sample": False, "pad_token_id": 0}
    asked: list[list[int]] = []

    def whole(ids: Tensor, mask: Tensor) -> Tensor:
        asked.extend(ids.tolist())
        return torch.full((len(ids), 4), 7)

    found = compressor(keep).generated(ids, mask.bool(), 6, never, settings, whole)
    assert found.tolist() == [greedy(CONTEXTS[0], 6, keep), greedy(CONTEXTS[1], 6, keep), [7, 7, 7, 7, 0, 0]]
    assert asked == [[5]]


def test_a_stop_ends_a_row() -> None:
    ids, mask = padded([torch.tensor(row) for row in CONTEXTS[:2]])
    settings = {"do_sample": False, "pad_token_id": 0}

    def stop(new: Tensor) -> Tensor:
        return torch.tensor([new.shape[1] >= 2, new.shape[1] >= 4])

    found = compressor().generated(ids, mask.bool(), 8, stop, settings, lambda *_: ids)
    assert found.shape == (2, 4)
    assert found[0, 2:].tolist() == [0, 0]
    assert found[0, :2].tolist() == greedy(CONTEXTS[0], 2, 0.25)
