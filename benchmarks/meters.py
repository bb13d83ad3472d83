"""What a computation asks of a machine, counted on any device without a clock: bytes, operations, waits, allocations.

Counted where PyTorch dispatches an operation, so that the same meter reads any implementation. A fused operation
counts what goes in and comes out, not what it keeps to itself. Only torch is needed.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_GATHERS = {"index_select", "gather", "embedding", "index"}
_SCATTERS = {"index_copy", "index_copy_", "index_put", "index_put_", "scatter", "scatter_", "index_add", "index_add_"}
_WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
_READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy"}


@dataclass
class Counts:
    """What was counted; numbers of one `Meter` block."""

    nbytes: int = 0
    """Bytes of the inputs and outputs of every operation that is not a view. An expanded dimension counts once; an
    indexed read or write counts the entries that it moves, not the tensor that they lie in."""
    kernels: int = 0
    """Operations that are not views or mere allocations."""
    ops: Counter[str] = field(default_factory=Counter)
    """The same by name."""
    waits: Counter[str] = field(default_factory=Counter)
    """Operations for which the host has to wait for a device: scalars, data-dependent shapes, copies to the host."""
    storages: list[int] = field(default_factory=list)
    """Bytes of every storage that an operation allocated, in order."""

    @property
    def largest(self) -> int:
        """Bytes of the largest allocation."""
        return max(self.storages, default=0)


class Meter(TorchDispatchMode):
    """Counts whatever runs within the block: `with Meter() as counts: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._reads = _HostReads(self.counts)

    def __enter__(self) -> Counts:
        self._reads.__enter__()
        super().__enter__()
        return self.counts

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        if name in _WAITS or _waits(name, func, args, kwargs, given, made):
            self.counts.waits[name] += 1
        known = {one.untyped_storage().data_ptr() for one in given}
        fresh = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in made}
        self.counts.storages += [size for address, size in fresh.items() if address not in known and size]
        if _is_view(func) or name in _ALLOCATES:
            return result
        self.counts.kernels += 1
        self.counts.ops[name] += 1
        self.counts.nbytes += _moved(name, func, args, given, made)
        return result


class _HostReads(TorchFunctionMode):
    """Counts reads of whole tensors by the host, which the dispatcher does not see where the tensor is there."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.counts.waits[_READS[func]] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether the results share the memory of an argument and nothing is written."""
    returned = [one.alias_info for one in func._schema.returns]
    return any(info is not None and not info.is_write for info in returned)


def _waits(name: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    if name == "repeat_interleave":  # by a tensor of counts
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_"):
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    to_host = name in ("_to_copy", "copy_") and any(one.device.type != "cpu" for one in given)
    return to_host and all(one.device.type == "cpu" for one in made)


def _moved(name: str, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> int:
    if name in _GATHERS:
        return 2 * sum(map(nbytes, made)) + sum(nbytes(one) for one in given if one is not args[0])
    if name in _SCATTERS:  # the source, its places, and the same amount written
        sources = [one for one in given if one is not args[0]]
        return sum(map(nbytes, sources)) + max(map(nbytes, sources), default=0)
    if name in ("copy_", "fill_", "zero_"):  # what was there before is not read
        return nbytes(args[0]) + sum(nbytes(one) for one in given[1:])
    return sum(map(nbytes, given)) + sum(map(nbytes, made))


def nbytes(held: Tensor) -> int:
    """Bytes of the distinct entries of a tensor: an expanded dimension counts once."""
    numel = 1
    for size, stride in zip(held.shape, held.stride(), strict=True):
        numel *= size if stride or size == 0 else 1
    return numel * held.element_size()


def slope(at: list[float], values: list[float]) -> float:
    """Least-squares slope: what one more of `at` costs, with everything constant taken out."""
    middle, mean = sum(at) / len(at), sum(values) / len(values)
    covariance = sum((x - middle) * (y - mean) for x, y in zip(at, values, strict=True))
    return covariance / sum((x - middle) ** 2 for x in at)
