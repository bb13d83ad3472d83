"""torch's default dtype changes nothing: every tensor that learnkv makes has a dtype of its own."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learnkv import Policy, attach, continuation, generate, load_policy, prefill
from learnkv.inference.models import load_model
from learnkv.persistence.named_configs import CONFIGS

POLICIES = [path.stem for path in sorted((CONFIGS / "policies").glob("*.yaml"))]


@functools.cache
def model() -> Any:
    return attach(load_model("reference")[0])


class Trace(TorchDispatchMode):
    """The operations whose results are of a dtype that none of their arguments has."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._has(result) and not self._has((args, kwargs)):
            self.found.append(str(func))
        return result

    def _has(self, tree: object) -> bool:
        return any(isinstance(leaf, Tensor) and leaf.dtype == self.dtype for leaf in tree_leaves(tree))


@pytest.fixture
def bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def budget_of(policy: Policy) -> dict[str, float]:
    """A budget that the policy can spend."""
    if policy.precision is None:
        return {"keep": 0.4}
    return {"keep": 1} if policy.scorer is None else {"bytes": 0.4}


def results(name: str) -> list[Tensor]:
    """What a policy keeps, scores and lets the model generate; of one with weights, the gradients of a step too."""
    policy, question = load_policy(name).requires_grad_(), tokens(2, 5)
    cache = prefill(model(), tokens(2, 60), policies=[policy])
    budget = budget_of(policy)
    plan = [] if policy.scorer is None else [policy.plan(cache.fork(), **budget)]
    small = policy.compress(cache.fork(), **budget)
    found = [part for one in plan for part in (one.scores.detach(), one.wanted.detach(), one.budgets)]
    found += [generate(model(), question, small, max_new_tokens=20), torch.tensor(small.spent, dtype=torch.float64)]
    if weights := list(policy.parameters()):
        student = policy.relax(cache, keep=0.4)
        continuation(model(), question, student).log_softmax(-1)[..., 3].mean().backward()
        found += [weight.grad for weight in weights]
    return found


@functools.cache
def expected(name: str) -> list[Tensor]:
    return results(name)


@pytest.mark.parametrize("name", [*POLICIES, "reference"])
def test_no_tensor_of_the_default_dtype_appears(name: Any, bfloat16: Any) -> None:
    with Trace(torch.bfloat16) as trace:
        results(name)
    assert not trace.found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["snapkv", "adakv", "restkv", "criticalkv", "kvzip", "rkv", "triattention", "reference"]
)
def test_results_are_the_same(name: Any, dtype: Any) -> None:
    right = expected(name)
    torch.set_default_dtype(dtype)
    try:
        again = results(name)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(right, again, strict=True):
        assert one.dtype == other.dtype or dtype == torch.float64
        assert torch.equal(one.double(), other.double())
