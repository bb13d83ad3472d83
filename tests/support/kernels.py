"""Helpers of the tests of kernels: the device, rounding, and memory that is NaN until it is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from learnkv.ops.softmax_terms import SoftmaxTerms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Largest relative error of rounding to nearest."""

STORED = ROUNDING | ({} if DEVICE.type == "cuda" else {torch.bfloat16: 2.0**-7})
"""The same of a stored result: the interpreter truncates instead of rounding."""


def capped_with_sinks(heads: int) -> SoftmaxTerms:
    """A cap below many logits, and sinks [H*G] of which some take most of the attention."""
    return SoftmaxTerms(2.5, torch.linspace(-2, 3, heads, device=DEVICE))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, allocated tensors are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers on the device, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_within(got: Tensor, truth: Tensor, budget: Tensor) -> None:
    """Raise unless `got` differs from the float64 `truth` by no more than `budget`, element by element."""
    excess = ((got.double() - truth).abs() / budget.clamp_min(1e-300)).nan_to_num(nan=torch.inf)
    excess = torch.where((got == truth) | ((got.double() - truth).abs() <= budget), 0.0, excess)
    assert excess.max() <= 1, f"{float(excess.max()):.3g} times the error budget at {int(excess.argmax())}"
