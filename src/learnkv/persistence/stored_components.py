"""Codecs and page selectors of a stored cache: their classes, arguments and the tables that they decode with."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from learnkv.core.codec import Codec
from learnkv.core.component import Component, class_path
from learnkv.errors import UserError
from learnkv.formats.tensors import digest
from learnkv.persistence.policies import build_policy
from learnkv.precision.uniform import UniformPrecision


def described_components(components: Sequence[Component]) -> list[dict[str, Any]]:
    """Class, arguments and digest of the tables of every component."""
    return [
        {
            "kind": "codec" if isinstance(part, Codec) else "pages",
            "spec": {"class_path": class_path(part), "init_args": part.spec()},
            "tables": _tables(part),
        }
        for part in components
    ]


def built_components(described: Sequence[Mapping[str, Any]], allow: Sequence[str], folder: Path) -> list[Component]:
    """The components, built once for all caches that name them alike.

    Raises:
        UserError: a class that is not allowed, or a table that is not the one that entries were stored with.
    """
    built = []
    for part in described:
        component = _built(json.dumps([part.get("kind"), part.get("spec")]), tuple(allow), str(folder))
        if _tables(component) != part.get("tables"):
            raise UserError(f"{folder}: entries were stored with another table of {component.name} than there is now")
        built.append(component)
    return built


@functools.lru_cache(maxsize=64)
def _built(described: str, allow: tuple[str, ...], folder: str) -> Component:
    kind, spec = json.loads(described)
    if kind == "pages":
        selector = build_policy({"scorer": None, "pages": spec}, allow, folder).pages
        assert selector is not None
        return selector
    both = {"class_path": "learnkv.precision.UniformPrecision", "init_args": {"keys": spec, "values": spec}}
    precision = build_policy({"scorer": None, "precision": both}, allow, folder).precision
    assert isinstance(precision, UniformPrecision)
    return precision.keys


def _tables(component: Component) -> str | None:
    """Digest of all tensors of a component, whatever files they come from; None where it has none."""
    tensors = {
        f"{path}.{name}": value
        for path, module in component.named_modules()
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False))
        if isinstance(value, Tensor)
    }
    return digest(tensors) if tensors else None
