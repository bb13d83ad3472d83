"""Memory of live tensors, counted at PyTorch's dispatcher, on any device."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that were created within the block, `now` and at the `peak`.

    Workspaces of fused operations are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for output in tree_leaves(result):
            if isinstance(output, Tensor) and id(output.untyped_storage()) not in inputs:
                self._count(output.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._counted:
            return
        self._counted.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._discount, id(storage), storage.nbytes())

    def _discount(self, storage_id: int, size: int) -> None:
        self._counted.discard(storage_id)
        self.now -= size
