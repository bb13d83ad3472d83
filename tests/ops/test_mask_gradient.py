"""Attention to what was kept has the gradients of gated attention with gates of zero and one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.arguments import call
from support.continuations import SEGMENT, Case, double, without
from torch import Tensor

from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.relaxed_attention import relaxed_attention

DIFFERENTIABLE = ("query", "gates", "tail_keys", "tail_values")

CASES = {
    "one prompt": Case([9], heads=1, group=1, slots=21, dim=8),
    "three continuations, a head without entries, one with all": Case([5, 0, 21, 1], copies=3, slots=21, dim=8),
    "group of 7, padded tails": Case([5, 0, 21, 1], group=7, copies=2, slots=21, dim=8, masked=True),
    "nothing kept": Case([0, 0], group=2, copies=2, slots=21, dim=8),
    "three prompts": Case([4, 20, 0, 1, 7, 7], group=4, slots=21, dim=8, new=1, masked=True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def gradients(
    function: Callable[..., Any], given: dict[str, Any], direction: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: given[name].detach().clone().requires_grad_() for name in DIFFERENTIABLE}
    output = call(function, given | leaves)
    output.backward(direction)
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}


@every_case
def test_the_gradients_are_those_of_gated_attention(case: Case) -> None:
    given = double(case.inputs())
    if case.masked:
        given["tail_mask"][0, 0, 0, 0] = True  # where nothing is seen, the gate's gradient has no bound to agree on
    ours, found = gradients(relaxed_attention, given, case.direction(torch.float64))
    told, expected = gradients(gated_attention, without(given, *SEGMENT), case.direction(torch.float64))
    torch.testing.assert_close(ours, told, rtol=1e-12, atol=1e-13)
    for name in DIFFERENTIABLE:
        assert expected[name].abs().max() > 0.01
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@every_case
def test_the_output_is_that_of_deployment(case: Case) -> None:
    given = case.inputs()
    output, _ = call(decode_attention, without(given, "gates", "keys", "values"))
    given["gates"] = torch.rand(given["gates"].shape)  # which are not read
    assert torch.equal(call(relaxed_attention, given), output)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_continuation_are_differences_of_the_output(masked: bool) -> None:
    given = double(Case([3, 0], slots=4, dim=3, new=2, tail=3, copies=2, masked=masked).inputs())
    leaves = [given[name].requires_grad_() for name in ("query", "tail_keys", "tail_values")]

    def attend(query: Tensor, tail_keys: Tensor, tail_values: Tensor) -> Tensor:
        changed = {"query": query, "tail_keys": tail_keys, "tail_values": tail_values}
        return call(relaxed_attention, given | changed)

    assert torch.autograd.gradcheck(attend, leaves)


def test_gradients_of_soft_gates_are_differences_of_the_output() -> None:
    given = without(double(Case([3, 0], slots=4, dim=3, new=2, tail=3, copies=2).inputs()), *SEGMENT)
    given["gates"] = torch.rand(given["gates"].shape, generator=torch.Generator().manual_seed(0)).double() * 0.8 + 0.1
    leaves = [given[name].requires_grad_() for name in DIFFERENTIABLE]

    def attend(*held: Tensor) -> Tensor:
        return call(gated_attention, given | dict(zip(DIFFERENTIABLE, held, strict=True)))

    assert torch.autograd.gradcheck(attend, leaves)


def test_a_query_that_sees_nothing_has_no_gradient() -> None:
    case = Case([0, 3], slots=6, dim=4, masked=True)
    given = double(case.inputs())
    given["tail_mask"][:] = False
    output, found = gradients(relaxed_attention, given, case.direction(torch.float64))
    assert (output[:, :2] == 0).all()
    assert (found["query"][:, :2] == 0).all()
    assert (found["gates"][:, 0] == 0).all()
    assert (found["tail_keys"] == 0).all()
    assert (found["tail_values"] == 0).all()
    assert all(held.isfinite().all() for held in found.values())
    assert found["gates"][:, 1].abs().min() > 0


def test_lower_precision_is_as_good_as_its_inputs() -> None:
    case = Case([9, 30, 0, 64], copies=2, group=2, dim=16, slots=70)
    exact = double(case.inputs(torch.bfloat16))
    _, found = gradients(relaxed_attention, case.inputs(torch.bfloat16), case.direction(torch.bfloat16))
    _, expected = gradients(relaxed_attention, exact, case.direction(torch.bfloat16).double())
    for name in DIFFERENTIABLE:
        assert found[name].dtype == (torch.float32 if name == "gates" else torch.bfloat16)
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(found[name].double(), expected[name], rtol=0.02, atol=0.02 * largest)
