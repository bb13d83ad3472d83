"""The kernels of training against the references in float64, within an error budget worked out from the inputs."""

from typing import Any

import pytest
import torch
from support.arguments import call
from support.continuations import SEGMENT, Case, double, without
from support.kernels import ROUNDING, STORED, assert_within, draw, poisoned
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.mask_gradient import mask_gradient
from learnkv.ops.relaxed_attention import relaxed_attention

UNIT = ROUNDING[torch.float32]


pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # the interpreter's logarithm of a closed gate


def as_called(case: Case, gated: bool = False) -> dict[str, Any]:
    """Arguments of `mask_gradient`: inputs, and the exact forward's results as the kernel would have stored them."""
    given = case.inputs()
    gates = draw(given["kept_keys"].shape[0], seed=9).sigmoid().mul(1.2).clamp(max=1) if gated else None
    exact = double(without(given, "gates", "keys", "values"))
    pools = {name: given[name].double().nan_to_num() for name in ("kept_keys", "kept_values")}
    output, lse = call(decode_attention, exact | pools)
    results = {"grad": case.direction(), "output": output.to(case.dtype), "lse": lse.float(), "kept_gates": gates}
    return without(given, "gates") | results


def norm(held: Tensor) -> Tensor:
    """Norms of vectors [..., D], as vectors along one axis."""
    length = held.double().nan_to_num().norm(dim=-1, keepdim=True)
    return torch.cat([length, torch.zeros_like(held[..., 1:], dtype=torch.float64)], -1)


def budgets(given: dict[str, Any], case: Case) -> list[Tensor]:
    """Largest errors of the four gradients that rounding explains.

    The partial sums of a score grow no faster than the product of the norms. A weight is off by what its score and the
    normaliser are off; what it weighs by the roundings of <dL/do, v> and <dL/do, o>.
    """
    exact = double(given)

    def longest(*names: str) -> float:
        return float(torch.cat([exact[name].nan_to_num().flatten(0, -2) for name in names]).norm(dim=-1).max())

    size = {name: longest(name) for name in ("query", "output")}
    size |= {name: longest(name, f"kept_{name}", f"tail_{name}") for name in ("keys", "values")}
    read = {name: longest(f"kept_{name}", f"tail_{name}") for name in ("keys", "values")}
    asked = given["scaling"] * size["query"]
    log_mass = float(given["lse"].nan_to_num(neginf=0).abs().max())
    terms = max(case.slots + case.tail, case.copies * case.group * case.new, case.dim)
    others = (log_mass + terms**0.5 + 16) * UNIT
    weight = 2 * UNIT * asked * read["keys"] + others
    if case.dtype != torch.float32:  # weights are rounded before they meet vectors
        weight += 2 * ROUNDING[case.dtype]

    # Along one axis, and with nothing to cancel, the gradients are sums of the sizes of their terms.
    along = {name: norm(given[name]) for name in ("grad", "values", "kept_values", "tail_values")}
    mask, _, _, tail = call(mask_gradient, exact | along | {"output": -norm(given["output"])}, impl="reference")
    tail, pull = tail[..., :1], read["values"] + size["output"]
    query = exact["grad"].norm(dim=-1, keepdim=True) * pull * read["keys"] * given["scaling"]
    return [
        (2 * UNIT * asked * size["keys"] + others) * mask,
        weight * query,
        weight * tail * pull * asked,
        weight * tail,
    ]


def check(case: Case, gated: bool = False) -> None:
    given = as_called(case, gated)
    with poisoned():
        found = call(mask_gradient, given, impl="triton")
    truth = call(mask_gradient, double(given), impl="reference")
    assert found[0].dtype == torch.float32
    assert {one.dtype for one in found[1:]} == {case.dtype}
    for got, told, budget in zip(found, truth, budgets(given, case), strict=True):
        stored = UNIT if got.dtype == torch.float32 else STORED[case.dtype]
        assert_within(got, told, budget + stored * told.abs())


CASES = {
    "one prompt of one query head": Case([9], heads=1, group=1),
    "group of 2, a head without entries, two continuations": Case([30, 0, 1, 70], copies=2, dim=40),
    "group of 4, a dominating head": Case([1, 1, 139, 2], group=4, slots=140, dim=64, new=1),
    "group of 7, three continuations, padded": Case([20, 33], heads=1, group=7, copies=3, dim=80, masked=True),
    "group of 8, largest head size": Case([30, 70], heads=1, group=8, dim=256, new=2, tail=2),
    "head size 96, bfloat16": Case([64, 5], dim=96, copies=2, dtype=torch.bfloat16),
    "head size 128, bfloat16, padded": Case([65, 0], heads=1, group=4, dim=128, dtype=torch.bfloat16, masked=True),
    "three prompts": Case([5, 0, 17], heads=1, group=2, copies=2, masked=True),
    "more queries than a tile, a tail of more than a block": Case([20], heads=1, group=1, new=67, tail=70),
    "nothing kept at all": Case([0, 0], group=1, masked=True),
    "soft cap and sinks, two continuations, padded": Case([30, 0], copies=2, dim=40, masked=True, capped=True),
    "soft cap and sinks, bfloat16": Case([65], heads=1, group=4, dim=64, new=1, dtype=torch.bfloat16, capped=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_the_truth(case: Case) -> None:
    check(case)


def test_gates_of_what_was_read() -> None:
    check(Case([9, 70, 0, 1], copies=2, dim=64), gated=True)
    check(Case([65], heads=1, group=4, dim=128, dtype=torch.bfloat16, masked=True), gated=True)


def test_a_pool_without_entries() -> None:
    given = as_called(Case([0, 0], slots=20))
    given |= {name: given[name][:0] for name in ("kept_keys", "kept_values")}
    for got, told in zip(*(call(mask_gradient, given, impl=impl) for impl in ("triton", "reference")), strict=True):
        torch.testing.assert_close(got, told, rtol=1e-4, atol=1e-5)


def test_every_run_gives_the_same_bits() -> None:
    given = as_called(Case([50, 3], copies=2, dtype=torch.bfloat16))
    first, again = (call(mask_gradient, given, impl="triton") for _ in range(2))
    assert all(map(torch.equal, first, again))


GATED = {
    "group of 2, head size 40, padded": Case([9, 30], copies=2, dim=40, masked=True),
    "group of 7, several blocks": Case([100], heads=1, group=7, slots=150, new=2),
    "group of 4, head size 256": Case([30], heads=1, group=4, dim=256),
    "group of 8, three prompts, bfloat16": Case([9, 0, 70], heads=1, group=8, dim=64, new=1, dtype=torch.bfloat16),
    "more queries than a tile": Case([20], heads=1, group=1, new=130, tail=130),
    "soft cap and sinks, padded": Case([9, 0], copies=2, dim=40, masked=True, capped=True),
}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("case", GATED.values(), ids=GATED.keys())
def test_gated_attention(case: Case, soft: bool) -> None:
    given = without(case.inputs(), *SEGMENT)
    if soft:
        given["gates"] = torch.where(given["gates"] == 1, torch.rand_like(given["gates"]), given["gates"])
    results = []
    for impl, inputs in (("triton", given), ("reference", double(given))):
        leaves = {
            name: inputs[name].detach().clone().requires_grad_()
            for name in ("query", "gates", "tail_keys", "tail_values")
        }
        with poisoned():
            output = call(gated_attention, inputs | leaves, impl=impl)
            output.backward(case.direction().to(output.dtype))
        results.append([output.detach(), *(leaf.grad for leaf in leaves.values())])
    for got, told in zip(*results, strict=True):
        # Scores of size 30 in single precision; vectors of the lower precision are rounded once more.
        error = 2e-5 if case.dtype == torch.float32 else 0.03
        torch.testing.assert_close(got.double(), told, rtol=error, atol=error * float(told.abs().max()))


def test_a_forward_and_its_backward_run_on_the_kernels() -> None:
    case = Case([9, 0, 33, 64], copies=2)
    results = []
    for impl in ("reference", "triton"):
        given = case.inputs()
        leaves = [given[name].requires_grad_() for name in ("query", "gates", "tail_keys", "tail_values")]
        output = call(relaxed_attention, given, impl=impl)
        output.backward(case.direction())
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for got, told in zip(*results, strict=True):
        torch.testing.assert_close(got, told, rtol=2e-5, atol=2e-5)


def test_the_kernels_have_no_gradient_of_the_prompt() -> None:
    given = without(Case([9, 30]).inputs(), *SEGMENT)
    given["keys"].requires_grad_()
    with pytest.raises(UserError, match="impl='triton': gated_attention computes no gradients"):
        call(gated_attention, given, impl="triton")
