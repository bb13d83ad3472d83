"""The choice between the implementations of an op."""

import importlib
import os
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
    """Within the block, ops that are called with impl="auto" and have `impl` run it."""
    token = _auto.set(impl)
    try:
        yield
    finally:
        _auto.reset(token)


def prefers_reference() -> bool:
    """Whether `using` has asked for references where kernels would compute."""
    return _auto.get() == "reference"


def resolve(impl: Impl) -> Impl:
    """What `impl` stands for here; a backward pass may run where the block that it was called in is not known."""
    return _auto.get() if impl == "auto" else impl


def implementation(op: str, impl: Impl, available: tuple[str, ...], *tensors: Tensor) -> ModuleType:
    """The module that computes `op` on `tensors`.

    "auto" is Triton where the tensors are on a CUDA device and ask for no gradient, which only a reference computes.

    Raises:
        UserError: for an explicit choice that cannot be met; it never falls back.
    """
    differentiable = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    if resolve(impl) in available:
        impl = resolve(impl)
    if impl == "auto":
        prefer_triton = "triton" in available and tensors[0].is_cuda and not differentiable
        impl = "triton" if prefer_triton else "reference"
    elif impl not in available:
        raise UserError(f"impl={impl!r}: {op} has {', '.join(available)}")
    elif impl == "triton":
        if differentiable:
            raise UserError(f"impl='triton': {op} computes no gradients, expected torch.no_grad() or impl='reference'")
        if tensors[0].device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(
                f"impl='triton': {op} needs a CUDA device, got tensors on the CPU (TRITON_INTERPRET=1 not set)"
            )
    return importlib.import_module(f"learnkv.ops.{op}.{impl}")
