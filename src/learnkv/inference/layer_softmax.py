"""The softmax of a layer where it is more than that of scaled products: soft-capped logits and attention sinks."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from learnkv.errors import UserError
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

_EAGER = "eager_attention_forward"


def softmax_terms(module: Any, softcap: float | None, sinks: Tensor | None) -> SoftmaxTerms:
    """The soft cap and the sinks [H*G] that a layer gives to its attention function.

    Raises:
        UserError: for what the layer's own eager attention does not compute from such arguments.
    """
    if softcap is None and sinks is None:
        return NO_TERMS
    layer: Any = type(module)
    name, computed = layer.__name__, _computes(_eager(layer))
    if softcap is not None and "softcap" not in computed:
        raise UserError(f"{name} uses softcap, which its own attention function does not have: not supported")
    if sinks is not None and ("sinks" not in computed or getattr(module, "sinks", None) is not sinks):
        raise UserError(f"{name} uses s_aux, which its own attention function does not have: not supported")
    if softcap is not None and not softcap > 0:
        raise UserError(f"{name} uses softcap={softcap:g}: expected a number above 0")
    return SoftmaxTerms(softcap, sinks)


def has_terms(module: Any) -> bool:
    """Whether a layer, or another of its model, has a softmax that sdpa does not compute."""
    config = getattr(module, "config", None)
    return hasattr(module, "sinks") or getattr(config, "attn_logit_softcapping", None) is not None


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Tensor:
    """What the untouched model computes: its own eager attention, [B, T, H*G, D].

    Args:
        mask: boolean mask of sdpa; None: causal.
    """
    layer: Any = type(module)
    eager = _eager(layer)
    if eager is None:
        raise UserError(f"{layer.__name__} has no attention function of its own: not supported")
    new, entries = query.shape[2], key.shape[2]
    if mask is None and new > 1:
        mask = torch.ones(1, 1, new, entries, dtype=torch.bool, device=query.device).tril(entries - new)
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    output: Tensor = eager(module, query, key, value, mask, **kwargs)[0]
    return output


@functools.cache
def _eager(layer: type) -> Callable[..., Any] | None:
    """The eager attention function beside a layer's class."""
    forwards = (inspect.unwrap(vars(kind)["forward"]) for kind in layer.__mro__ if "forward" in vars(kind))
    return next((forward.__globals__[_EAGER] for forward in forwards if _EAGER in forward.__globals__), None)


@functools.cache
def _computes(eager: Callable[..., Any] | None) -> frozenset[str]:
    """Names that an eager attention function reads."""
    if eager is None:
        return frozenset()
    plain = inspect.unwrap(eager)
    return frozenset(plain.__code__.co_names) | frozenset(inspect.signature(plain).parameters)
