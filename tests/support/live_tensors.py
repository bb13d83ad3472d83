"""Bytes of the tensors that are alive, found by a walk over objects."""

import gc
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage by its address."""
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def alive() -> dict[int, int]:
    """Every storage that a Python object holds; what a compiler traced with has none."""
    gc.collect()
    return storages(one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter))


def reachable(root: Any) -> dict[int, int]:
    """Every storage that can be reached from an object, except through modules, classes and functions."""
    found, known, pending = list[Tensor](), {id(root)}, [root]
    while pending:
        for part in gc.get_referents(pending.pop()):
            if id(part) in known or isinstance(part, nn.Module | type | FunctionType | ModuleType):
                continue
            known.add(id(part))
            (found if isinstance(part, Tensor) else pending).append(part)
    return storages(found)
