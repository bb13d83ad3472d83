"""KVgrad against its definition, with the gradient at the residual stream of a plain model."""

from typing import Any

import torch
from support.models import attached, build, padded, tokens
from torch import Tensor
from transformers import DynamicCache

from learnkv import Policy, prefill
from learnkv.allocators import Flat
from learnkv.scorers import KVgrad

POLICY = Policy(KVgrad(sinks=2, chunk=15, overlap=3), Flat(), sinks=2, recent=3)


def defined(prompt: torch.Tensor, begin: int, end: int, lead: int) -> torch.Tensor:
    """Scores [L, H, end - begin] of a chunk of the prompt [1, S] that the model reads again."""
    model = build("llama").eval()
    past = DynamicCache()
    with torch.no_grad():
        model(prompt, past_key_values=past)
    keys = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    streams: dict[int, Tensor] = {}
    attended: dict[int, Any] = {}
    last: list[Any] = []
    for number, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args, number=number: streams.__setitem__(number, args[0])
        )
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: attended.__setitem__(
                number, (kwargs["hidden_states"], kwargs["position_embeddings"])
            ),
            with_kwargs=True,
        )
    model.model.layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    ids = prompt[:, begin - lead : end]
    model(inputs_embeds=model.model.embed_tokens(ids).detach().requires_grad_(), past_key_values=past)
    hidden = last[0][0] if isinstance(last[0], tuple) else last[0]
    gradients = torch.autograd.grad(hidden.square().sum(), list(streams.values()))
    scores = []
    for number, gradient in enumerate(gradients):
        inputs, (cos, sin) = attended[number]
        module = model.model.layers[number].self_attn
        dim = module.head_dim
        queries = module.q_proj(inputs).view(1, ids.shape[1], -1, dim).transpose(1, 2)
        half = torch.cat([-queries[..., dim // 2 :], queries[..., : dim // 2]], -1)
        queries = (queries * cos.unsqueeze(1) + half * sin.unsqueeze(1)).unflatten(1, (2, -1))
        own = past.layers[number].keys[:, :, prompt.shape[1] :]
        among = torch.cat([keys[number][0][:, :, :2][:, :, : min(2, begin)], keys[number][0][:, :, begin:end], own], 2)
        logits = torch.einsum("bhgqd,bhsd->bhgqs", queries, among) * dim**-0.5
        own_mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        logits[..., -ids.shape[1] :].masked_fill_(own_mask, -torch.inf)
        weights = logits.softmax(-1)[..., min(2, begin) :][..., : end - begin]
        matrix = module.o_proj.weight.view(-1, 2, 2, dim).permute(1, 2, 0, 3)  # [H, G, E, D]
        sizes = torch.einsum("hged,bhsd->bhgse", matrix, keys[number][1][:, :, begin:end]).norm(dim=-1)
        product = weights * sizes.unsqueeze(3) * gradient.norm(dim=-1)[:, None, None, :, None]
        scores.append(product.amax((2, 3))[0])
    return torch.stack(scores).detach()


def test_the_scores_are_those_of_the_definition_and_a_padded_row_has_its_own() -> None:
    rows = [tokens(1, 28)[0], tokens(1, 15, seed=3)[0]]
    cache = prefill(attached("llama"), *padded(rows), policies=[POLICY])
    scores = torch.stack([POLICY.scorer(layer.observation()) for layer in cache.compressed_layers()])
    first, second = defined(rows[0][None], 0, 15, 0), defined(rows[0][None], 15, 28, 3)
    torch.testing.assert_close(scores[:, 0], torch.cat([first, second], -1), rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(scores[:, 1, :, -15:], defined(rows[1][None], 0, 15, 0), rtol=2e-3, atol=1e-4)


def test_nothing_that_trains_is_left_with_a_gradient() -> None:
    model = attached("llama")
    with torch.inference_mode():
        cache = prefill(model, tokens(1, 20), policies=[POLICY])
        assert POLICY.compress(cache, keep=0.3).spent == [0.3]
    assert all(weight.grad is None for weight in model.parameters())


def test_layers_with_a_window_take_part_in_the_gradient() -> None:
    """A prompt in chunks is the prompt at once, whatever layers there are."""
    model, prompt = attached("gemma3"), tokens(1, 30)
    whole, chunks = (prefill(model, prompt, policies=[POLICY], chunk_size=size) for size in (None, 11))
    for ours, theirs in zip(whole.compressed_layers(), chunks.compressed_layers(), strict=True):
        scores = POLICY.scorer(ours.observation())
        assert bool((scores > 0).all())
        torch.testing.assert_close(scores, POLICY.scorer(theirs.observation()), rtol=1e-3, atol=1e-6)
