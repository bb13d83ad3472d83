"""The choice between the implementations of an op."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from learnkv.errors import UserError

Impl = Literal["auto", "reference", "triton"]

_auto: ContextVar[Impl] = ContextVar("auto", default="auto")


@contextmanager
def using(impl: Impl) -> Iterator[None]:
    """Within the block, ops with impl="auto" run `impl` where they have it."""
    token = _auto.set(impl)
    try:
        yield
    finally:
        _auto.reset(token)


def prefers_reference() -> bool:
    """Whether `using("reference")` is in force."""
    return _auto.get() == "reference"


def resolve(impl: Impl) -> Impl:
    """`impl`, with "auto" replaced by the choice of `using`; a backward pass may run outside of its block."""
    return _auto.get() if impl == "auto" else impl


def implementation(
    op: str, impl: Impl, available: tuple[str, ...], *tensors: Tensor, lacks: str | None = None
) -> ModuleType:
    """The module that computes `op` on `tensors`.

    "auto" is Triton where the tensors are on a CUDA device and need no gradient, which only references compute.

    Args:
        op: the folder of its implementations.
        impl: the choice.
        available: implementations of the op.
        tensors: inputs.
        lacks: what the arguments ask for that the Triton kernel does not have; None: it has all.

    Raises:
        UserError: for an explicit choice that is not available; there is no fallback.
    """
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if resolve(impl) in available:
        impl = resolve(impl)
    if impl == "auto":
        prefer_triton = "triton" in available and tensors[0].is_cuda and not differentiable and lacks is None
        impl = "triton" if prefer_triton else "reference"
    elif impl not in available:
        raise UserError(f"impl={impl!r}: {op} has {', '.join(available)}")
    elif impl == "triton":
        if lacks is not None:
            raise UserError(f"impl='triton': {op} has no kernel for {lacks}, expected impl='reference'")
        if differentiable:
            raise UserError(f"impl='triton': {op} computes no gradients, expected torch.no_grad() or impl='reference'")
        if tensors[0].device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                f"impl='triton': {op} needs a CUDA device, got tensors on the CPU (TRITON_INTERPRET=1 not set)"
            )
    name = f"learnkv.ops.{op}.{impl}"
    return sys.modules.get(name) or importlib.import_module(name)
