"""Training steps on the meta device: shapes of all tensors without their values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from learnkv.ops.arguments import Pages, Ragged, Tail, Tier
from learnkv.ops.decode_attention import reference as attention
from learnkv.ops.gather_kv import reference as gather
from learnkv.ops.mask_gradient import reference as mask
from learnkv.ops.prompt_attention import reference as prompt
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.ops.spans import Spans
from learnkv.ops.window_scores import reference as window
from learnkv.training.memory.operations import OperationCount, bytes_of


@contextmanager
def on_meta_device(
    layers: int, prompts: int, kernels: bool = False, count: OperationCount | None = None
) -> Iterator[None]:
    """Makes a training step work on meta tensors within the block.

    Args:
        layers: number of compressed layers; all heads keep equally many entries.
        prompts: number of prompts in the batch.
        kernels: operations allocate their results only, as kernels on a GPU do; otherwise as their references.
        count: counts operations; a kernel on a GPU counts as one, with the products of matrices of its reference.
    """
    assert not (kernels and count), "a kernel that allocates its result only has no operations"
    ops = _Ops(layers, prompts, kernels, count)
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention, "decode_attention", ops.decode_attention))
        stack.enter_context(patch.object(prompt, "prompt_attention", ops.prompt_attention))
        stack.enter_context(patch.object(mask, "mask_gradient", ops.mask_gradient))
        stack.enter_context(patch.object(gather, "gather_kv", ops.gather_kv))
        stack.enter_context(patch.object(window, "window_scores", ops.window_scores))
        stack.enter_context(_Values(count))
        yield


class _Ops:
    """Operations on meta tensors; arguments as in `on_meta_device`."""

    def __init__(self, layers: int, prompts: int, kernels: bool, count: OperationCount | None) -> None:
        self.layers, self.prompts, self.kernels, self.count = layers, prompts, kernels, count
        self.attend, self.differentiate = attention.decode_attention, mask.mask_gradient
        self.score: Callable[..., Tensor] = window.window_scores
        self.read: Callable[..., Tensor] = prompt.prompt_attention

    def decode_attention(
        self,
        query: Tensor,
        kept: Ragged,
        tail: Tail,
        scaling: float,
        pages: Pages | None,
        tiers: Sequence[Tier] = (),
        terms: SoftmaxTerms = NO_TERMS,
        needs_lse: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp."""
        assert not tiers, "students read the entries of all levels as one segment"
        if self.kernels:
            return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        spans = self._equal_segments(len(kept.offset), tail.keys.shape[1], kept.keys, kept.longest)
        with self._kernel(query, query, tail.keys, tail.values, kept=spans):
            return self.attend(query, kept._replace(spans=spans), tail, scaling, pages, (), terms, needs_lse)

    def prompt_attention(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        """Output of full attention."""
        if self.count is not None:
            self.count.add(*_full_attention(query, keys, values, is_causal=mask is None), query.dtype)
        if self.kernels or self.count is not None:
            return torch.empty_like(query)
        return self.read(query, keys, values, mask, *rest)

    def mask_gradient(
        self, grad: Tensor, query: Tensor, output: Tensor, lse: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        """Gradients of the mask, the queries, and the tail's keys and values."""
        kept, tail, *others = rest
        if self.kernels:
            gradient = keys.new_empty(keys.shape[:3], dtype=torch.float32)
            return gradient, torch.empty_like(query), torch.empty_like(tail.keys), torch.empty_like(tail.values)
        spans = self._equal_segments(len(kept.offset), keys.shape[1], kept.keys, keys.shape[2])
        moved = (grad, query, query, output, keys, values, *2 * (tail.keys, tail.values))
        with self._kernel(*moved, kept=spans):
            return self.differentiate(grad, query, output, lse, keys, values, kept._replace(spans=spans), tail, *others)

    def gather_kv(self, keys: Tensor, values: Tensor, index: Tensor, first_row: int, out: Ragged, *_: Any) -> None:
        """Copies the kept entries of one layer."""
        if self.count is not None:
            self.count.add(0, 2 * bytes_of(out.keys, out.values) // self.layers, keys.dtype)

    def window_scores(self, queries: Tensor, keys: Tensor, *, group_reduce: str, **others: Any) -> Tensor:
        """Scores of all slots."""
        if not self.kernels:
            with self._kernel(queries, keys):
                return self.score(queries, keys, group_reduce=group_reduce, **others)
        batch, heads, slots = keys.shape[:3]
        group = (queries.shape[1] // heads,) if group_reduce == "none" else ()
        return keys.new_empty(batch, heads, *group, slots, dtype=torch.float32)

    def _kernel(self, *tensors: Tensor, kept: Sequence[tuple[int, int]] = ()) -> AbstractContextManager[None]:
        pairs = sum(length for _, length in kept) * 2 * tensors[0].shape[-1] * tensors[0].element_size()
        return nullcontext() if self.count is None else self.count.kernel(bytes_of(*tensors) + pairs, tensors[0].dtype)

    def _equal_segments(self, rows: int, heads: int, pool: Tensor, slots: int) -> Spans:
        is_prompt = pool.shape[0] == self.prompts * heads * slots  # one layer's; kept entries of all share a pool
        kept = slots if is_prompt else pool.shape[0] // (self.layers * self.prompts * heads)
        copies = rows // (self.prompts * heads)
        return Spans(((row // (copies * heads) * heads + row % heads) * kept, kept) for row in range(rows))


class _Values(TorchFunctionMode):
    """Values where Python code needs those of a meta tensor: masks are True. Full attention allocates its output."""

    def __init__(self, count: OperationCount | None = None) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if tensor is None:
            return func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            if self.count is not None:
                self.count.add(*_full_attention(*args[:3], **kwargs), tensor.dtype)
            return torch.empty_like(tensor)
        if func is Tensor.__bool__:
            return True
        if func is Tensor.tolist:
            return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()
        if func is Tensor.__int__:
            return 1
        if func is Tensor.nonzero:
            return tensor.new_zeros(tensor.numel(), tensor.ndim, dtype=torch.long)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return tensor.flatten(0, args[1].ndim - 1).clone()
        return func(*args, **kwargs)


def _full_attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, **_: Any) -> tuple[int, int]:
    """Floating-point operations and bytes of full attention; with a mask the pairs it hides are computed, too."""
    new, entries = query.shape[2], key.shape[2]
    pairs = new * entries - new * (new - 1) // 2 if is_causal else new * entries
    return 4 * query.shape[0] * query.shape[1] * query.shape[3] * pairs, bytes_of(query, query, key, value)
