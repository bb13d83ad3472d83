"""Floating-point operations and moved bytes of every operation, counted at PyTorch's dispatcher, on any device."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_GATHERS = frozenset(
    {torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather}
)
"""These read as much of their table as they return."""


class Operation(NamedTuple):
    """One operation of PyTorch, or one kernel."""

    flops: int
    """Floating-point operations in products of matrices."""
    moved: int
    """Bytes that are read and written."""
    float32: bool = False
    """Whether its matrices are float32 (or wider) rather than 16-bit."""


class OperationCount(TorchDispatchMode):
    """The operations within the block, by the `part` they belong to.

    Products of matrices are counted by PyTorch's own formulas; other operations count as bytes: their inputs are read
    and their results are written. Views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.operations: dict[str, list[Operation]] = defaultdict(list)
        self._kernel: list[int] | None = None  # the products of matrices within a kernel

    def add(self, flops: int, moved: int, dtype: torch.dtype) -> None:
        """Count one operation on matrices of this type."""
        self.operations[self.part].append(Operation(flops, moved, dtype.itemsize > 2))

    @contextmanager
    def kernel(self, moved: int, dtype: torch.dtype) -> Iterator[None]:
        """Count what runs within the block as one operation of this type that moves this many bytes."""
        assert self._kernel is None
        self._kernel = []
        try:
            yield
        finally:
            flops, self._kernel = sum(self._kernel), None
        self.add(flops, moved, dtype)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what runs within the block as this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        if self._kernel is not None:
            self._kernel.append(flops)
        elif moved := _moved(func, (args, kwargs), result):
            self.add(flops, moved, result.dtype if isinstance(result, Tensor) else torch.float32)
        return result


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of tensors; of an expanded one those that are stored."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors if t is not None)


def _moved(func: Any, inputs: Any, result: Any) -> int:
    """Bytes that an operation reads and writes; 0 for a view or an allocation."""
    returns = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    if is_view or "empty" in func.overloadpacket.__name__:
        return 0
    written = bytes_of(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
    if func.overloadpacket in _GATHERS:
        return 2 * written
    return written + bytes_of(*(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))
