"""Every family of models that transformers builds small: equal numbers, or a refusal by name."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.masking import masked_logits
from torch import Tensor
from transformers import DynamicCache

from learnkv import Policy, attach, continuation, generate, prefill
from learnkv.allocators import AdaKV
from learnkv.errors import UserError
from learnkv.ops.softmax_terms import SoftmaxTerms
from learnkv.scorers import ExpectedAttention, SnapKV, StreamingLLM
from tools import families

SPLIT, FUTURE, SINKS = families.PROMPT, 12, 4
IDS = families.prompt(SPLIT + 6)
PINNED = f"transformers=={transformers.__version__}" in (
    Path(__file__).resolve().parents[1] / "constraints.txt"
).read_text(encoding="utf-8")

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[Any]:
    with torch.no_grad():
        yield


plain = functools.cache(families.build)


@functools.cache
def attached(name: Any) -> Any:
    return attach(families.build(name))


def supported(name: Any) -> Any:
    """The family, None for one that is refused by name: `tried` lets no other error of ours pass."""
    family = families.tried(name)
    return family if family.supported else None


def spread(logits: Tensor) -> float:
    """Differences that single precision leaves undecided."""
    return 3e-4 * max(1.0, float(logits.std()))


every_family = pytest.mark.parametrize("name", families.NAMES)


@every_family
def test_everything_is_kept_as_transformers_keeps_it(name: Any) -> None:
    if supported(name) is None:
        return
    model, ours = plain(name), attached(name)
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :SPLIT], past_key_values=cache)
    positions = torch.arange(SPLIT, IDS.shape[1]).unsqueeze(0)
    expected = model(input_ids=IDS[:, SPLIT:], position_ids=positions, past_key_values=cache).logits
    for chunk_size in (None, 12):  # no part of one token, whose step some state spaces of transformers take otherwise
        got = continuation(ours, IDS[:, SPLIT:], prefill(ours, IDS[:, :SPLIT], chunk_size=chunk_size))
        torch.testing.assert_close(got, expected, rtol=0, atol=spread(expected))
    settings = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)[:, IDS.shape[1] :]
    read = prefill(ours, IDS[:, :SPLIT])
    assert torch.equal(generate(ours, IDS[:, SPLIT:], read.fork(), max_new_tokens=5), tokens)
    own = ours.generate(IDS, attention_mask=torch.ones_like(IDS), past_key_values=read, **settings)
    assert torch.equal(own[:, IDS.shape[1] :], tokens)


@every_family
def test_evicted_entries_are_masked_ones(name: Any) -> None:
    if supported(name) is None:
        return
    ours, policy = attached(name), Policy(SnapKV(window=8), AdaKV())
    cache = prefill(ours, IDS[:, :SPLIT], policy=policy, keep=0.4)
    kept = {
        layer: [cache.kept_positions(layer, 0, head) for head in range(cache.layers[layer].heads)]
        for layer in cache.compressible
    }
    expected = masked_logits(plain(name), IDS[0, :SPLIT], IDS[0, SPLIT:], kept)
    got = continuation(ours, IDS[:, SPLIT:], cache)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=spread(expected))


@every_family
def test_a_left_padded_row_is_read_as_alone(name: Any) -> None:
    if supported(name) is None:
        return
    ours, policy = attached(name), Policy(SnapKV(window=8), AdaKV())
    row = families.prompt(SPLIT - 9)
    ids, mask = IDS[:, :SPLIT].repeat(2, 1), torch.ones(2, SPLIT, dtype=torch.long)
    ids[1, 9:], mask[1, :9] = row, 0
    said = IDS[:, SPLIT:].repeat(2, 1)
    got = continuation(ours, said, prefill(ours, ids, mask, policy=policy, keep=0.4))
    for index, alone in enumerate((IDS[:, :SPLIT], row)):
        expected = continuation(ours, said[:1], prefill(ours, alone, policy=policy, keep=0.4))[0]
        torch.testing.assert_close(got[index], expected, rtol=0, atol=spread(expected))


@every_family
def test_keys_are_rotated_as_the_layer_rotates_them(name: Any) -> None:
    """Its own code, in double precision, from the hidden states of the kept tokens and embeddings of new positions."""
    policy = Policy(StreamingLLM(sinks=3), sinks=0, recent=0, rerotate="start")
    if (family := supported(name)) is None:
        return
    if family.rotation:
        with pytest.raises(UserError, match="rotation"):
            prefill(attached(name), IDS[:, :SPLIT], policy=policy, keep=0.5)
        return
    cache = prefill(attached(name), IDS[:, :SPLIT], policy=policy, keep=0.5)
    for index, layer in layers_of(name).items():
        if index not in cache.compressible:
            continue
        kept = cache.kept_positions(index, 0, 0)
        keys = layer(layer.hidden[:, kept], torch.arange(len(kept)))[1]
        segment = cache.layers[index].segment
        for head in range(keys.shape[1]):
            begin = int(segment.offset[head])
            got = segment.keys[begin : begin + len(kept)].double()
            torch.testing.assert_close(got, keys[0, head], rtol=0, atol=2e-4 * float(keys.abs().max()))


@every_family
def test_expected_attention_is_that_of_the_layers_own_queries(name: Any) -> None:
    capped = getattr(plain(name).config, "attn_logit_softcapping", None) if supported(name) else None
    scorer = ExpectedAttention(future=FUTURE, sinks=SINKS, covariance=capped is None)
    if (family := supported(name)) is None:
        return
    if family.rotation:
        with pytest.raises(UserError, match="rotation"):
            prefill(attached(name), IDS[:, :SPLIT], policies=[Policy(scorer)])
        return
    cache = prefill(attached(name), IDS[:, :SPLIT], chunk_size=17, policies=[Policy(scorer)])
    for index, layer in layers_of(name).items():
        if index not in cache.compressible:
            continue
        obs = cache.layers[index].observation()
        expected = layer.expected_attention(obs.scaling, obs.terms)
        got = scorer(obs)[0, :, SINKS:].double()
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6)


class OwnLayer:
    """An attention layer of transformers in float64, applied to hidden states at positions."""

    def __init__(self, model: Any, module: Any) -> None:
        self.model, self.module = model, module
        self.double = copy.deepcopy(module).double()
        self.hidden = self.arguments(torch.arange(SPLIT), IDS[:, :SPLIT])["hidden_states"].double()

    def arguments(self, positions: Tensor, ids: Tensor | None = None) -> dict[str, Any]:
        """What the layer is called with for tokens at `positions`."""
        calls: list[dict[str, Any]] = []
        handle = self.module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(families.by_name(module, args, kwargs)), with_kwargs=True
        )
        ids = IDS[:, :1].expand(1, len(positions)) if ids is None else ids
        self.model(input_ids=ids, position_ids=positions.unsqueeze(0), use_cache=False)
        handle.remove()
        return calls[0]

    def __call__(self, hidden: Tensor, positions: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values [1, N, T, D]; without rotation for positions None."""
        count = hidden.shape[1]
        arguments = self.arguments(torch.arange(count) if positions is None else positions)
        embeddings = arguments.get("position_embeddings")
        if isinstance(embeddings, tuple):
            cos, sin = (part.double() for part in embeddings)
            rotation = (cos, sin) if positions is not None else (torch.ones_like(cos), torch.zeros_like(sin))
            arguments["position_embeddings"] = rotation
        elif embeddings is not None and positions is None:
            arguments["position_embeddings"] = torch.ones_like(embeddings)
        taken: list[Tensor] = []

        def take(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
            taken.extend((query, key, value))
            return query.transpose(1, 2), None

        transformers.AttentionInterface.register("own_layer", take)
        self.double.config._attn_implementation = "own_layer"
        self.double(**{**arguments, "hidden_states": hidden, "attention_mask": None})
        return tuple(taken)

    def rotation(self, position: int) -> Tensor:
        """[D, D] matrix that queries before rotation are multiplied with, found from all tokens of the prompt."""
        before = self(self.hidden, None)[0].flatten(1, 2)[0]
        after = self(self.hidden, torch.full((SPLIT,), position))[0].flatten(1, 2)[0]
        return torch.linalg.lstsq(before, after).solution

    def expected_attention(self, scaling: float, terms: SoftmaxTerms) -> Tensor:
        """Scores [H, S - sinks]."""
        queries = self(self.hidden, None)[0][0, :, SINKS:]
        _, keys, values = (part[0, :, :] for part in self(self.hidden, torch.arange(SPLIT)))
        turn = torch.stack([self.rotation(SPLIT + step) for step in range(FUTURE)]).mean(0)
        mean = queries.mean(1)
        apart = queries - mean.unsqueeze(1)
        covariance = turn.T @ (apart.transpose(1, 2) @ apart / queries.shape[1]) @ turn
        mean = mean @ turn
        group = len(queries) // len(keys)
        scores = []
        for head, (own_keys, own_values) in enumerate(zip(keys, values, strict=True)):
            attention = []
            for member in range(head * group, (head + 1) * group):
                spread = torch.einsum("sd,de,se->s", own_keys, covariance[member], own_keys)
                logits = scaling * own_keys @ mean[member]
                if terms.softcap is None:
                    logits = logits + scaling**2 / 2 * spread
                logits = terms.capped(logits)[SINKS:]
                if terms.sinks is not None:
                    logits = torch.cat([logits, terms.sinks[member : member + 1].double()])
                attention.append(logits.softmax(0)[: SPLIT - SINKS])
            scores.append(torch.stack(attention).mean(0) * own_values[SINKS:].norm(dim=-1))
        return torch.stack(scores)


@functools.cache
def layers_of(name: str) -> dict[int, OwnLayer]:
    model = families.build(name)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "o_proj")]
    return {module.layer_idx: OwnLayer(model, module) for module in modules[:3]}


@pytest.mark.slow
@pytest.mark.skipif(not PINNED, reason="the page is that of the transformers in constraints.txt")
def test_the_page_is_up_to_date() -> None:
    assert families.PAGE.read_text(encoding="utf-8") == families.page(), "run python -m tools.families --write"
    assert sum(families.tried(name).supported for name in families.NAMES) >= 50
