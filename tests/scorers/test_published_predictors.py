"""Predictors as their papers have them are special cases of ours."""

import pytest
import torch
from support.models import attached, build, padded, tokens
from support.observations import randomised
from support.tables import made_up
from torch import nn
from transformers import PreTrainedModel

from learnkv import Policy, attach, prefill
from learnkv.formats import tensors
from learnkv.inference.prefill import score_prompt
from learnkv.scorers import Constant, FastKVzip, GateScorer, HiddenScorer, Scorer

LAYERS, HEADS, GROUP, DIM, HIDDEN = 3, 2, 2, 16, 48  # of the tiny Llama


def scores_and_inputs(model: PreTrainedModel, scorer: Scorer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Scores [L, 1, H, S] of a prompt, and what its attention blocks read."""
    heard, modules = [], [layer.self_attn for layer in model.model.layers]
    hooks = [
        one.register_forward_pre_hook(lambda _, __, given: heard.append(given["hidden_states"]), with_kwargs=True)
        for one in modules
    ]
    try:
        return score_prompt(model, scorer, tokens(1, 40)), heard
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("width", [0, 512])
def test_kvzap(width: int) -> None:
    """Linear or with 512 hidden units and GELU (kvpress' `KVzapModel`), over hidden states as they are."""
    scorer = randomised(HiddenScorer(Constant(), LAYERS, HEADS, DIM, HIDDEN, width=width, normalized=False))
    found, inputs = scores_and_inputs(attached("llama"), scorer)
    for layer, hidden in enumerate(inputs):
        last = nn.Linear(width or HIDDEN, HEADS)
        if width:
            first = nn.Linear(HIDDEN, width)
            first.weight.data, first.bias.data = scorer.weight_in[layer].T, scorer.bias[layer, 0]
        last.weight.data, last.bias.data = scorer.weight_out[layer].T, scorer.bias_out[layer, 0]
        published = nn.Sequential(first, nn.GELU(), last) if width else last
        torch.testing.assert_close(found[layer], published(hidden).transpose(1, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_locret(family: str) -> None:
    """silu([q, k, v] W_1) W_2 of queries, keys and values before rotation, without biases of its own."""
    model = attach(build(family))
    config = model.config
    heads, dim, count = config.num_key_value_heads, config.hidden_size, config.num_hidden_layers
    scorer = HiddenScorer(
        Constant(), count, heads, config.head_dim, dim, width=1024, normalized=False, activation="silu"
    )
    parts = [(one.self_attn.q_proj, one.self_attn.k_proj, one.self_attn.v_proj) for one in model.model.layers]
    read, generator = sum(part.out_features for part in parts[0]), torch.Generator().manual_seed(0)
    first = torch.randn(count, read, 1024, generator=generator) * read**-0.5
    last = torch.randn(count, 1024, heads, generator=generator) / 32
    for layer, projections in enumerate(parts):
        biases = [one.bias if one.bias is not None else torch.zeros(one.out_features) for one in projections]
        scorer.weight_in.data[layer] = torch.cat([one.weight for one in projections]).T @ first[layer]
        scorer.bias.data[layer] = torch.cat(biases) @ first[layer]
    scorer.weight_out.data = last
    found, inputs = scores_and_inputs(model, scorer.requires_grad_(False))
    for layer, hidden in enumerate(inputs):
        vectors = torch.cat([project(hidden) for project in parts[layer]], -1)
        published = nn.functional.silu(vectors @ first[layer]) @ last[layer]
        torch.testing.assert_close(found[layer], published.transpose(1, 2), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_fast_kvzip() -> None:
    """The gate of a published file, in the class that is trained."""
    file = made_up("gate", LAYERS, HEADS, GROUP, DIM, HIDDEN)
    theirs = FastKVzip(file)
    ours = GateScorer(Constant(), LAYERS, HEADS, HIDDEN, GROUP, rank=4, sinks=3, scaled=False).requires_grad_(False)
    ours.gate.load_state_dict(
        {name.replace(".", "_"): one for name, one in tensors.read(file, tensors.KVZIP_GATE).items()}
    )
    model, prompts = attached("llama"), padded([tokens(1, 60)[0], tokens(1, 41)[0]])
    one, other = Policy(ours, sinks=0, recent=0), Policy(theirs, sinks=0, recent=0)
    cache = prefill(model, *prompts, policies=[one, other])
    plans = [policy.plan(cache, keep=0.3) for policy in (one, other)]
    assert torch.equal(plans[0].raw_scores, plans[1].raw_scores)
    assert plans[0].raw_scores.isfinite().sum() == LAYERS * HEADS * 101
    small = [policy.compress(cache.fork(), keep=0.3) for policy in (one, other)]
    assert torch.equal(*(held.compressed_layers()[1].segment.positions for held in small))
