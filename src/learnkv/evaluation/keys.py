"""Digests of policies: constructor arguments, tensors, files that they read, source text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learnkv.errors import UserError
from learnkv.evaluation.sources import code_text, source_digest
from learnkv.formats.files import content_digest
from learnkv.inference.digest import tensor_digest
from learnkv.policy.policy import Policy

_LEFT_OUT = frozenset(vars(nn.Module())) | {"_arguments", "adapter", "trained_for", "other_weights"}
"""Attributes that decide nothing, or are digested otherwise: parameters, buffers, the policy's spec, its adapter."""


def policy_digest(policy: Policy) -> str:
    """SHA-256 of everything in a policy that decides what is kept; neither its file's path nor its device counts."""
    tensors = dict([*policy.named_parameters(), *policy.named_buffers()])
    about = {
        "spec": _plain(policy.spec()),
        "tensors": {name: tensor_digest(tensor) for name, tensor in sorted(tensors.items())},
        "attributes": {path: _attributes(module) for path, module in policy.named_modules()},
        "sources": source_digest(*{type(module): None for module in policy.modules()}),
        "adapter": None if policy.adapter is None else policy.adapter.name,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters, buffers and submodules, such as a plain tensor, and its hooks."""
    plain = {name: value for name, value in vars(module).items() if name not in _LEFT_OUT}
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return {name: _plain(value) for name, value in {**plain, "hooks": hooks}.items()}


def _plain(value: Any, outer: tuple[int, ...] = ()) -> Any:
    """A value as JSON: arrays and files by their content, functions by their code, objects by what they hold.

    Args:
        outer: identities of the values that this one is within.
    """
    if value is None or isinstance(value, bool | int | float | complex | bytes):
        return repr(value)
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return tensor_digest(torch.from_numpy(np.ascontiguousarray(value)))
    if isinstance(value, str | Path):
        return content_digest(str(value)) or str(value)
    if isinstance(value, type | ModuleType):
        return getattr(value, "__qualname__", value.__name__)
    if id(value) in outer:
        return "itself"
    outer = (*outer, id(value))
    if isinstance(value, Mapping):
        return [[_plain(key, outer), _plain(item, outer)] for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(item, outer)) for item in value)
    parts = value if isinstance(value, list | tuple) else _parts(value)
    return [type(value).__qualname__, *(_plain(part, outer) for part in parts)]


def _parts(value: Any) -> Sequence[Any]:
    """What a function or an object is made of; of an object, what pickle would store."""
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return code_text(value.__code__), value.__defaults__, value.__kwdefaults__, cells
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    try:
        reduced = value.__reduce_ex__(4)
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UserError(
            f"a policy holds a {type(value).__qualname__}, whose content is not known ({error}): stored samples could "
            "not be distinguished from others"
        ) from None
    if isinstance(reduced, str):
        return (reduced,)
    make, arguments, state, *items = (*reduced, None)[:5]
    return getattr(make, "__qualname__", ""), arguments, state, [list(part) for part in items if part is not None]
