"""A training step on the meta device: the shapes of all that it makes, and nothing computed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from learnkv.ops.arguments import Pages, Ragged, Tail
from learnkv.ops.decode_attention import reference as decode
from learnkv.ops.gather_kv import reference as gather
from learnkv.ops.mask_gradient import reference as mask
from learnkv.ops.window_scores import reference as window


@contextmanager
def on_meta_device(layers: int, prompts: int, kernels: bool) -> Iterator[None]:
    """Within the block tensors of the meta device go through whatever a training step does with tensors.

    Args:
        layers: of the model that are compressed; all heads keep equal numbers of entries.
        prompts: in the batch.
        kernels: operations make their results only, as kernels on a GPU do; else what their references make.
    """
    attend: Any = decode.decode_attention
    differentiate: Any = mask.mask_gradient

    def even(rows: int, heads: int, pool: Tensor, slots: int) -> list[tuple[int, int]]:
        whole = pool.shape[0] == prompts * heads * slots  # a layer's own prompt; what was kept is in one pool for all
        kept = slots if whole else pool.shape[0] // (layers * prompts * heads)
        copies = rows // (prompts * heads)
        return [((row // (copies * heads) * heads + row % heads) * kept, kept) for row in range(rows)]

    def attended(query: Tensor, kept: Ragged, tail: Tail, scaling: float, pages: Pages | None) -> tuple[Tensor, Tensor]:
        if kernels:
            return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        spans = even(len(kept.offset), tail.keys.shape[1], kept.keys, kept.longest)
        return attend(query, kept._replace(spans=spans), tail, scaling, pages)

    def differentiated(
        grad: Tensor, query: Tensor, output: Tensor, lse: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        kept, tail, *others = rest
        if kernels:
            made = keys.new_empty(keys.shape[:3], dtype=torch.float32)
            return made, torch.empty_like(query), torch.empty_like(tail.keys), torch.empty_like(tail.values)
        spans = even(len(kept.offset), keys.shape[1], kept.keys, keys.shape[2])
        return differentiate(grad, query, output, lse, keys, values, kept._replace(spans=spans), tail, *others)

    def scored(queries: Tensor, keys: Tensor, *, group_reduce: str, **_: Any) -> Tensor:
        batch, heads, slots = keys.shape[:3]
        group = (queries.shape[1] // heads,) if group_reduce == "none" else ()
        return keys.new_empty(batch, heads, *group, slots, dtype=torch.float32)

    with ExitStack() as stack:
        stack.enter_context(patch.object(decode, "decode_attention", attended))
        stack.enter_context(patch.object(mask, "mask_gradient", differentiated))
        stack.enter_context(patch.object(gather, "gather_kv", lambda *_: None))
        if kernels:
            stack.enter_context(patch.object(window, "window_scores", scored))
        stack.enter_context(_Answers())
        yield


class _Answers(TorchFunctionMode):
    """Answers what Python asks of tensors without values: all of a mask is True. Full attention makes its output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if held is None:
            return func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return torch.empty_like(held)
        if func is Tensor.__bool__:
            return True
        if func is Tensor.tolist:
            return torch.ones(held.shape).tolist()
        if func is Tensor.nonzero:
            return held.new_zeros(held.numel(), held.ndim, dtype=torch.long)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return held.flatten(0, args[1].ndim - 1).clone()
        return func(*args, **kwargs)
