"""Digests of policies: constructor arguments, tensors, files that they read, source text."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learnkv.evaluation.sources import source_digest
from learnkv.inference.digest import tensor_digest
from learnkv.policy.policy import Policy

_MODULE = frozenset(vars(nn.Module())) | {"_arguments"}
"""Attributes that every module has; parameters and buffers are digested by name, arguments as the policy's spec."""


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
    """What a module holds beside parameters, buffers and submodules, such as a table as a plain tensor."""
    return {name: _plain(value) for name, value in vars(module).items() if name not in _MODULE}


def _plain(value: Any) -> Any:
    """A value as JSON: arrays and files by their content."""
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, np.ndarray):
        return (
            tensor_digest(torch.from_numpy(np.ascontiguousarray(value))) if value.dtype.kind in "biuf" else repr(value)
        )
    if isinstance(value, str | Path):
        return _content(Path(value).expanduser()) or str(value)
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_plain(item)) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__qualname__, *(_plain(getattr(value, field.name)) for field in fields(value))]
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return value.__qualname__ if isinstance(value, type) else type(value).__qualname__


def _content(path: Path) -> str | None:
    """Digest of a file, or of the files in a folder; None for a word that is no path, such as the name of an option."""
    if not (path.suffix or len(path.parts) > 1):
        return None
    try:
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        if not path.is_dir():
            return None
        files = sorted(file for file in path.iterdir() if file.is_file())
        return hashlib.sha256(json.dumps([[file.name, _content(file)] for file in files]).encode()).hexdigest()
    except (OSError, ValueError):
        return None
