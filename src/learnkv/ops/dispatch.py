"""The choice between the implementations of an op."""

from typing import Literal

from learnkv.errors import UserError

Impl = Literal["auto", "reference", "triton"]


def choose(op: str, impl: Impl, available: tuple[str, ...], prefer_triton: bool) -> str:
    """Name of the implementation to run; an explicit choice that is not available raises, it never falls back."""
    if impl == "auto":
        return "triton" if prefer_triton and "triton" in available else "reference"
    if impl not in available:
        raise UserError(f"impl={impl!r}: {op} has {', '.join(available)}")
    return impl
