"""Extra passes over a prompt that has been read, and scores as a teacher's signal."""

import pytest
import torch
from support.models import attached, build, padded, tokens
from torch import Tensor

from learnkv import Policy, continuation, load_policy, prefill
from learnkv.errors import UserError
from learnkv.inference.prefill import score_prompt
from learnkv.scorers import KVzip, SnapKV

pytestmark = pytest.mark.compat


def weights_of(ids: Tensor) -> Tensor:
    """Attention weights [L, B, H*G, T, T] of the untouched model, computed by transformers."""
    return torch.stack(build("llama", attn="eager")(input_ids=ids, output_attentions=True).attentions)


@torch.no_grad()
@pytest.mark.parametrize("queries", ["all", "repeated"])
def test_scores_are_the_largest_attention_of_the_repetition(queries: str) -> None:
    ids, before, after = tokens(1, 30), (5, 6, 7), (8,)
    scorer = KVzip(chunk=40, softmax="all", queries=queries, before=before, after=after)
    scores = score_prompt(attached("llama"), scorer, ids)
    told = torch.tensor([[*before, *after]])
    weights = weights_of(torch.cat([ids, told, ids], 1))[:, :, :, 30 + 4 * (queries == "repeated") :, :30]
    expected = weights.amax(3).unflatten(2, (2, -1)).amax(3)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_prompt_is_repeated_in_chunks_with_the_end_of_the_one_before() -> None:
    """Each chunk counts alone, within a softmax over the first tokens, the chunk, and the pass."""
    ids, size, overlap, sinks = tokens(1, 30), 12, 3, 4
    scores = score_prompt(attached("llama"), KVzip(chunk=size, overlap=overlap, sinks=sinks, before=(5, 6)), ids)
    for begin in range(0, 30, size):
        chunk, lead = ids[:, begin : begin + size], ids[:, max(begin - overlap, 0) : begin]
        told = torch.cat([torch.tensor([[5, 6]]), lead, chunk], 1)
        weights = weights_of(torch.cat([ids, told], 1))[:, :, :, 30:]
        among = torch.ones(weights.shape[-1], dtype=torch.bool)
        among[sinks:30], among[begin : begin + size] = False, True
        weights = weights * among
        expected = (weights / weights.sum(-1, keepdim=True)).amax(3).unflatten(2, (2, -1)).amax(3)
        part = slice(begin, begin + chunk.shape[1])
        torch.testing.assert_close(scores[..., part], expected[..., part], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rows_of_different_lengths_are_repeated_as_alone() -> None:
    prompts = [tokens(1, length, seed=2)[0] for length in (50, 23, 7)]
    scorer = KVzip(chunk=20, prefix=2, normalized=True)
    together = score_prompt(attached("llama"), scorer, *padded(prompts))
    for row, prompt in enumerate(prompts):
        alone = score_prompt(attached("llama"), scorer, prompt[None])[:, 0]
        torch.testing.assert_close(together[:, row, :, -len(prompt) :], alone, rtol=1e-4, atol=1e-5)
        assert (together[:, row, :, : -len(prompt)] == -torch.inf).all()
        assert (alone[..., :2] > alone[..., 2:].max()).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_pass_leaves_nothing_behind_but_its_figures(family: str) -> None:
    model, (ids, mask), said = attached(family), padded([tokens(1, 40)[0], tokens(1, 40, seed=1)[0]]), tokens(2, 5)
    extra_pass_tokens = prefill(model, ids, mask, policies=[Policy(KVzip(chunk=16))])
    plain = prefill(model, ids, mask)
    assert list(extra_pass_tokens.extra_pass_tokens.values()) == [[40 + 8 + 8] * 2]
    assert plain.extra_pass_tokens == {}
    figures = len(extra_pass_tokens.compressible) * 2 * 40 * plain.layers[plain.compressible[0]].heads * 4
    assert extra_pass_tokens.nbytes == plain.nbytes + figures
    assert torch.equal(continuation(model, said, extra_pass_tokens), continuation(model, said, plain))


def test_a_pass_that_does_not_fit_into_the_context_is_refused() -> None:
    policy, ids = Policy(KVzip()), tokens(1, 300)
    with pytest.raises(UserError, match=r"a pass of 300 tokens .* makes 600, the model's context is 512: .*\(chunk\)"):
        prefill(attached("llama"), ids, policy=policy, keep=0.5)
    assert prefill(attached("llama"), ids, policy=Policy(KVzip(chunk=200)), keep=0.5).spent == [0.5]


def test_a_prompt_that_was_not_repeated_is_refused() -> None:
    whole = prefill(attached("llama"), tokens(1, 30))
    with pytest.raises(UserError, match=r"hand it to prefill, among policies= or as policy="):
        load_policy("kvzip").compress(whole, keep=0.5)


@torch.no_grad()
def test_any_scorer_is_a_teacher() -> None:
    ids, mask = padded([tokens(1, 40)[0], tokens(1, 12)[0]])
    scores = score_prompt(attached("llama"), SnapKV(), ids, mask)
    plan = Policy(SnapKV(), sinks=0, recent=0).plan(prefill(attached("llama"), ids, mask), keep=0.5)
    assert torch.equal(scores, plan.scores)
