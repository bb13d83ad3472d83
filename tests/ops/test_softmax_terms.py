"""Soft-capped logits and attention sinks in the references, against their definition in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.arguments import call
from support.continuations import SEGMENT, Case, double, without
from support.observations import observe
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.attention_columns import attention_columns
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.evicted_moments import estimated_attention, merged_attention, weighted_moments
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.prompt_attention import prompt_attention
from learnkv.ops.prompt_attention import reference as prompt_reference
from learnkv.ops.relaxed_attention import relaxed_attention
from learnkv.ops.retention_attention import retention_attention
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.ops.window_attention import window_attention
from learnkv.ops.window_scores import reference as window_reference
from learnkv.ops.window_scores import window_scores

CAP = 1.5  # many logits are larger


def sinks(heads: int) -> Tensor:
    """[H*G] some that take little of the attention, some that take most of it."""
    return torch.linspace(-2, 4, heads, dtype=torch.float64)


def terms_of(name: str, heads: int) -> SoftmaxTerms:
    return SoftmaxTerms(None if name == "sinks" else CAP, None if name == "softcap" else sinks(heads))


every_term = pytest.mark.parametrize("name", ["softcap", "sinks", "both"])


def weights_of(logits: Tensor, visible: Tensor, terms: SoftmaxTerms, gates: Tensor | None = None) -> Tensor:
    """[B, H*G, T, S]: the definition, a sink being one more entry whose weight is dropped."""
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.exp() if gates is None else gates * logits.exp()
    mass = weights.sum(-1, keepdim=True)
    if terms.sinks is not None:
        mass = mass + terms.sinks.exp().view(1, -1, 1, 1)
    return weights / mass.masked_fill(mass == 0, 1)  # padding attends to nothing


def continued(given: dict[str, Any], terms: SoftmaxTerms) -> Tensor:
    """Attention [B*C, H*G, T, D] of continuations to gated prompts and their tails, by the definition."""
    query, gates, mask = given["query"], given["gates"], given["tail_mask"]
    rows, query_heads, new, _ = query.shape
    copies, group = rows // gates.shape[0], query_heads // gates.shape[1]

    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(copies, 0).repeat_interleave(group, 1)

    parts = ((spread(given[name]), given[f"tail_{name}"].repeat_interleave(group, 1)) for name in ("keys", "values"))
    keys, values = (torch.cat(part, 2) for part in parts)
    slots = given["tail_keys"].shape[2]
    if mask is None:
        mask = torch.ones(rows, 1, new, slots, dtype=torch.bool).tril(slots - new)
    factor = spread(gates).unsqueeze(2).expand(-1, -1, new, -1)
    factor = torch.cat([factor, mask.expand(-1, query_heads, -1, -1).to(factor.dtype)], -1)
    logits = query @ keys.mT * given["scaling"]
    return weights_of(logits, torch.ones_like(logits, dtype=torch.bool), terms, factor) @ values


CASES = {
    "padded": Case([9, 1, 30, 70], copies=2, masked=True, dim=16),
    "group of 3": Case([20], heads=1, group=3, copies=3, new=1, dim=8),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def exact_inputs(case: Case) -> dict[str, Any]:
    """Float64, and no evicted entry is so much larger than the others that its gradient is bounded."""
    given = double(case.inputs())
    return given | {"keys": given["keys"].clamp(-1.5, 1.5), "tail_keys": given["tail_keys"].clamp(-1.5, 1.5)}


def gradients(function: Callable[..., Any], given: dict[str, Any], direction: Tensor) -> list[Tensor]:
    names = ("query", "gates", "tail_keys", "tail_values")
    leaves = {name: given[name].detach().clone().requires_grad_() for name in names}
    output = function(given | leaves)
    output.backward(direction)
    return [output.detach(), *(leaves[name].grad for name in names)]


@every_term
@every_case
def test_training_differentiates_the_definition(case: Case, name: str) -> None:
    given = exact_inputs(case)
    terms = terms_of(name, case.heads * case.group)
    pools = {part: torch.zeros_like(given[part]) for part in ("kept_keys", "kept_values")}
    for row, (begin, count) in enumerate(zip(given["offset"].tolist(), given["length"].tolist(), strict=True)):
        prompt, head = row // (case.copies * case.heads), row % case.heads
        for part in ("keys", "values"):
            pools[f"kept_{part}"][begin : begin + count] = given[part][prompt, head, given["gates"][prompt, head] > 0]
    direction = case.direction().double()
    told = gradients(lambda inputs: continued(inputs, terms), given, direction)
    inputs = {**given, **pools, "terms": terms}
    hard = gradients(lambda leaves: call(relaxed_attention, leaves), inputs, direction)
    for ours in (hard, gradients(lambda leaves: call(gated_attention, without(leaves, *SEGMENT)), inputs, direction)):
        for found, expected in zip(ours, told, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    output, lse = call(decode_attention, without(inputs, "gates", "keys", "values"))
    torch.testing.assert_close(output, told[0], rtol=1e-9, atol=1e-9)
    if terms.sinks is not None:
        assert bool((lse >= terms.sinks.view(1, -1, 1)).all()), "the log-sum-exp is without the sink"


@every_term
def test_soft_gates(name: str) -> None:
    case = CASES["padded"]
    given = exact_inputs(case)
    given["gates"] = torch.rand(given["gates"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    terms = terms_of(name, case.heads * case.group)
    direction = case.direction().double()
    told = gradients(lambda inputs: continued(inputs, terms), given, direction)
    ours = gradients(lambda leaves: call(gated_attention, without(leaves, *SEGMENT), terms=terms), given, direction)
    for found, expected in zip(ours, told, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_bound_of_gradients_counts_the_sink() -> None:
    """An evicted entry far above what is attended to, but below the sink, has the gradient of its mask unbounded."""
    case = Case([3], heads=1, group=1, slots=6, dim=4, new=1, tail=1)
    given = double(case.inputs())
    given |= {"keys": given["keys"].clone(), "scaling": 1.0}
    evicted = int((given["gates"][0, 0] == 0).nonzero()[0])
    given["keys"][0, 0, evicted] = given["query"][0, 0, 0] * 12 / given["query"][0, 0, 0].square().sum()
    given["kept_keys"] = given["kept_keys"].nan_to_num() * 0.01
    given["keys"][0, 0, given["gates"][0, 0] > 0] *= 0.01
    terms, grad = SoftmaxTerms(None, torch.tensor([14.0], dtype=torch.float64)), case.direction().double()
    output, lse = call(decode_attention, without(given, "gates", "keys", "values"), terms=terms)
    found = gradients(lambda leaves: call(relaxed_attention, leaves, terms=terms), given, grad)[2]
    value = given["values"][0, 0, evicted]
    expected = (12 - lse).exp() * (grad * (value - output)).sum(-1)
    torch.testing.assert_close(found[0, 0, evicted], expected.view(()), rtol=1e-6, atol=1e-12)


def dense(obs: Observation, terms: SoftmaxTerms) -> Tensor:
    """Weights [B, H, G, W, S] of the window, float64."""
    heads = obs.keys.shape[1]
    keys = obs.keys.double().nan_to_num().repeat_interleave(obs.queries.shape[1] // heads, 1)
    logits = obs.queries.double().nan_to_num() @ keys.mT * obs.scaling
    own = obs.query_positions[:, None, :, None]
    visible = (obs.positions.unsqueeze(2) <= own) & (own >= 0) & obs.valid.unsqueeze(2)
    visible = visible.repeat_interleave(obs.queries.shape[1] // heads, 1)
    return weights_of(logits, visible, terms).unflatten(1, (heads, -1))


def arguments(obs: Observation) -> dict[str, Any]:
    names = ("queries", "keys", "query_positions", "positions", "valid", "scaling", "terms")
    return {name: getattr(obs, name) for name in names}


@every_term
def test_scores_are_the_models_own_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = observe([40, 13], window=9)
    terms = terms_of(name, obs.queries.shape[1])
    obs = dataclasses.replace(obs, terms=terms)
    weights = dense(obs, terms)
    torch.testing.assert_close(obs.window_attention(9)[0].double(), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(window_attention(**arguments(obs))[0].double(), weights, rtol=1e-5, atol=1e-6)
    columns = attention_columns(**arguments(obs))
    torch.testing.assert_close(columns.double(), weights.sum(3), rtol=1e-5, atol=1e-6)
    scores = {"kernel_size": 1, "window_reduce": "sum", "group_reduce": "none"}
    before = ~obs.in_window(9).unsqueeze(2).expand(-1, -1, 3, -1)
    expected = weights.sum(3)[before]
    for few in (window_reference._FEW, 0):  # at once, and in two passes over parts
        monkeypatch.setattr(window_reference, "_FEW", few)
        monkeypatch.setattr(window_reference, "_SHORTEST", 7)
        found = window_scores(**arguments(obs), **scores)[before]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    if terms.sinks is not None:
        assert bool((weights.sum(-1) < 0.999).any()), "no attention goes to a sink"


@every_term
@pytest.mark.parametrize("block", [1, 200, 2**22])
def test_reading_a_prompt(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_reference, "_BLOCK", block)
    noise = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 7, 8, generator=noise, dtype=torch.float64) * 2
    keys, values = torch.randn(2, 2, 2, 19, 8, generator=noise, dtype=torch.float64)
    terms = terms_of(name, 6)
    causal = torch.ones(2, 1, 7, 19, dtype=torch.bool).tril(12)
    padded = causal.clone()
    padded[1, :, :, :4] = False
    for mask in (None, causal, padded):
        visible = causal if mask is None else mask
        logits = query @ keys.repeat_interleave(3, 1).mT * 0.4
        expected = weights_of(logits, visible, terms) @ values.repeat_interleave(3, 1)
        found = prompt_attention(query, keys, values, mask, 0.4, terms)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    nothing = prompt_attention(query, keys, values, torch.zeros_like(causal), 0.4, terms)
    assert bool((nothing == 0).all())


def test_evicted_entries_that_are_alike_are_remembered_exactly() -> None:
    """Of equal keys the capped estimate is exact; of unequal ones to first order in their spread."""
    noise = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 3, 8, generator=noise, dtype=torch.float64) * 3
    key = torch.randn(1, 1, 1, 8, generator=noise, dtype=torch.float64)
    spread, values = torch.randn(2, 1, 1, 30, 8, generator=noise, dtype=torch.float64)
    terms = terms_of("both", 2)
    kept = Ragged(torch.zeros(0, 8).double(), torch.zeros(0, 8).double(), *torch.zeros(2, 1, dtype=torch.long), 0)
    tail = Tail(*torch.randn(2, 1, 1, 3, 8, generator=noise, dtype=torch.float64))
    errors = []
    for size in (0.0, 0.01, 0.02):
        keys = key + size * spread
        every = Tail(torch.cat([keys, tail.keys], 2), torch.cat([values, tail.values], 2))
        truth, _ = decode_attention(query, kept, every, 0.5, terms=terms)
        moments = weighted_moments(keys, values, torch.ones(1, 1, 30))
        estimate = estimated_attention(query, *moments.values(), 0.5, terms)
        part = decode_attention(query, kept, tail, 0.5, terms=terms)
        errors.append(float((merged_attention(*part, *estimate)[0] - truth).abs().max()))
    assert errors[0] < 1e-6
    assert 3.5 < errors[2] / errors[1] < 4.5, "the covariance is not that of capped logits"


@every_term
def test_fading_entries(name: str) -> None:
    noise = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 11, 8, generator=noise, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 2, 11, 8, generator=noise, dtype=torch.float64)
    fading = -torch.rand(1, 2, 11, generator=noise, dtype=torch.float64)
    terms = terms_of(name, 4)
    age = (torch.arange(11).unsqueeze(-1) - torch.arange(11)).clamp(min=0)
    gates = (fading.unsqueeze(2) * age).exp().repeat_interleave(2, 1)
    visible = torch.ones(11, 11, dtype=torch.bool).tril()
    logits = query @ keys.repeat_interleave(2, 1).mT * 0.6
    expected = weights_of(logits, visible, terms, gates) @ values.repeat_interleave(2, 1)
    found = retention_attention(query, keys, values, fading, 0.6, terms=terms)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_nothing_is_computed_without_terms() -> None:
    logits = torch.randn(3, 4)
    assert NO_TERMS.capped(logits) is logits
    assert NO_TERMS.slope(logits) is None
    assert NO_TERMS.of_heads(2) is None
