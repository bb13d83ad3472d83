"""Gated attention: forward of the deployed set, gradients for every entry, against autograd in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention

BATCH, HEADS, SLOTS, DIM, SCALING = 2, 2, 12, 8, 0.4
group_and_copies = pytest.mark.parametrize(("group", "copies"), [(1, 1), (2, 1), (3, 2), (7, 3)])


def problem(group: int, copies: int, new: int = 4, before: int = 2, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = BATCH * copies
    shapes = {
        "query": (rows, HEADS * group, new, DIM),
        "keys": (BATCH, HEADS, SLOTS, DIM),
        "values": (BATCH, HEADS, SLOTS, DIM),
        "gates": (BATCH, HEADS, SLOTS),
        "tail_keys": (rows, HEADS, before + new, DIM),
        "tail_values": (rows, HEADS, before + new, DIM),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made["gates"] = (made["gates"] > 0).float()
    made["gates"][0, 1] = 0  # a head that keeps nothing
    made["gates"][1, 0] = 1
    mask = torch.ones(rows, 1, new, before + new, dtype=torch.bool).tril(before)
    mask[-1, :, :, 1] = False
    return made, mask


def dense(made: dict[str, Tensor], mask: Tensor) -> Tensor:
    """The definition, in the precision of its inputs: softmax weights times gates, normalised."""
    rows, query_heads = made["query"].shape[:2]
    copies, group = rows // BATCH, query_heads // HEADS

    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(copies, 0).repeat_interleave(group, 1)

    keys = torch.cat([spread(made["keys"]), made["tail_keys"].repeat_interleave(group, 1)], 2)
    values = torch.cat([spread(made["values"]), made["tail_values"].repeat_interleave(group, 1)], 2)
    scores = made["query"] @ keys.transpose(-1, -2) * SCALING
    gates = spread(made["gates"]).unsqueeze(2).expand(-1, -1, scores.shape[2], -1)
    gates = torch.cat([gates, mask.expand(-1, query_heads, -1, -1).to(gates.dtype)], -1)
    weights = gates * (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return weights / weights.sum(-1, keepdim=True) @ values


def gradients(
    function: Callable[..., Any], made: dict[str, Tensor], mask: Tensor, direction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {name: held.clone().requires_grad_() for name, held in made.items()}
    output = function(inputs, mask)
    (output * direction.to(output.dtype)).sum().backward()
    return output.detach(), {name: held.grad for name, held in inputs.items()}


def ours(made: dict[str, Tensor], mask: Tensor | None) -> Tensor:
    return gated_attention(
        made["query"],
        made["keys"],
        made["values"],
        made["gates"],
        Tail(made["tail_keys"], made["tail_values"], mask),
        SCALING,
    )


@group_and_copies
@pytest.mark.parametrize("soft", [False, True])
def test_output_and_gradients_are_those_of_the_definition(group: int, copies: int, soft: bool) -> None:
    made, mask = problem(group, copies)
    if soft:
        made["gates"] = torch.rand(made["gates"].shape, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(made["query"].shape, generator=torch.Generator().manual_seed(2))
    output, grads = gradients(ours, made, mask, direction)
    exact = {name: held.double() for name, held in made.items()}
    told, expected = gradients(dense, exact, mask, direction)
    torch.testing.assert_close(output, told.float(), rtol=1e-5, atol=2e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad, expected[name].float(), rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@group_and_copies
def test_gates_of_zero_and_one_are_eviction(group: int, copies: int) -> None:
    made, mask = problem(group, copies)
    rows = made["gates"].repeat_interleave(copies, 0).bool()
    pool_keys, pool_values = (
        torch.cat(
            [
                head[chosen]
                for row, keep in zip(made[name].repeat_interleave(copies, 0), rows, strict=True)
                for head, chosen in zip(row, keep, strict=True)
            ]
        )
        for name in ("keys", "values")
    )
    length = rows.sum(-1).flatten()
    offset = length.cumsum(0) - length
    deployed, _ = decode_attention(
        made["query"],
        Ragged(pool_keys, pool_values, offset, length, int(length.max())),
        Tail(made["tail_keys"], made["tail_values"], mask),
        SCALING,
    )
    torch.testing.assert_close(ours(made, mask), deployed, rtol=1e-5, atol=2e-6)


@group_and_copies
def test_the_gradient_of_a_gate_is_the_formula_for_kept_and_evicted_entries_alike(group: int, copies: int) -> None:
    """dL/dm_i = sum over queries of exp(s_qi - lse_q) <dL/do_q, v_i - o_q>."""
    made, mask = problem(group, copies)
    direction = torch.randn(made["query"].shape, generator=torch.Generator().manual_seed(3))
    output, grads = gradients(ours, made, mask, direction)
    made = {name: held.double() for name, held in made.items()}
    keys, values = (made[name].repeat_interleave(copies, 0).repeat_interleave(group, 1) for name in ("keys", "values"))
    gates = made["gates"].repeat_interleave(copies, 0).repeat_interleave(group, 1).unsqueeze(2)
    past = made["query"] @ keys.transpose(-1, -2) * SCALING
    recent = made["query"] @ made["tail_keys"].repeat_interleave(group, 1).transpose(-1, -2) * SCALING
    seen = torch.cat([past + gates.log(), recent.masked_fill(~mask, -torch.inf)], -1)
    lse = seen.logsumexp(-1, keepdim=True)
    gain = torch.einsum("rhtd,rhtsd->rhts", direction.double(), values.unsqueeze(2) - output.double().unsqueeze(3))
    formula = ((past - lse).exp() * gain).sum(2)
    formula = formula.view(BATCH, copies, HEADS, group, SLOTS).sum((1, 3))
    evicted = made["gates"] == 0
    assert (grads["gates"][evicted].abs() > 1e-4).all()
    torch.testing.assert_close(grads["gates"], formula.float(), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_dominating_evicted_entry_is_bounded_and_the_output_untouched() -> None:
    made, mask = problem(2, 1)
    made["gates"][1, 0, 5] = 0
    before = ours(made, mask)
    made["keys"][1, 0, 5] = 50 * made["query"][1, 0, 0]
    direction = torch.randn(made["query"].shape, generator=torch.Generator().manual_seed(4))
    output, grads = gradients(ours, made, mask, direction)
    assert torch.equal(output, before)
    made = {name: held.double() for name, held in made.items()}
    queries = made["query"][1, :2]
    kept = torch.cat([made["keys"][1, 0][made["gates"][1, 0] == 1], made["tail_keys"][1, 0]])
    scores = (queries @ kept.T * SCALING).masked_fill(
        torch.cat([torch.zeros(4, 11, dtype=torch.bool), ~mask[1, 0]], -1), -torch.inf
    )
    top = scores.amax(-1)
    own = (queries @ made["keys"][1, 0, 5] * SCALING - top).clamp(max=4).exp()
    weight = own / (scores - top.unsqueeze(-1)).exp().sum(-1)
    gain = (direction[1, :2].double() * (made["values"][1, 0, 5] - output[1, :2].double())).sum(-1)
    torch.testing.assert_close(grads["gates"][1, 0, 5], (weight * gain).sum().float(), rtol=1e-4, atol=1e-5)


def test_without_a_mask_the_tail_is_causal() -> None:
    made, _ = problem(2, 2)
    mask = torch.ones(4, 1, 4, 6, dtype=torch.bool).tril(2)
    assert torch.equal(ours(made, None), ours(made, mask))
