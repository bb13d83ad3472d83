"""Tables for models of any shape: what the policies that read a file need in a test."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from learnkv.config import CONFIGS
from learnkv.formats import duo, headkv, layers, lukv
from learnkv.io import build_policy
from learnkv.policy import Policy

FOLDER = tempfile.TemporaryDirectory()


def _draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _curve(path: Path, count: int, heads: int) -> Path:
    evicted = torch.arange(1, 100).view(-1, 1, 1) / 100
    return lukv.write(path, evicted ** (0.5 + _draw(count, heads)))


MAKE: dict[str, Callable[[Path, int, int, int], Path]] = {
    "scores": lambda path, count, heads, group: headkv.write(path, _draw(count, heads * group, 3).tolist()),
    "heads": lambda path, count, heads, group: headkv.write(path, _draw(count, heads * group, 3).tolist()),
    "curve": lambda path, count, heads, group: _curve(path, count, heads),
    "gates": lambda path, count, heads, group: duo.write(path, _draw(count, heads), 2, 9),
    "errors": lambda path, count, heads, group: layers.write(path, _draw(count).tolist()),
    "budgets": lambda path, count, heads, group: layers.write(path, _draw(count).tolist()),
}
"""The argument that names a table -> what writes one for `count` layers of `heads` kv heads of `group` query heads."""


@functools.cache
def made_up(argument: str, count: int, heads: int, group: int) -> str:
    """Path of a table that fits."""
    path = Path(FOLDER.name) / f"{argument}-{count}-{heads}-{group}"
    return str(MAKE[argument](path, count, heads, group))


@functools.cache
def policy_of(name: str, count: int, heads: int, group: int) -> Policy:
    """The policy of a YAML; tables of the reference model give way to some for this shape."""
    spec = yaml.safe_load((CONFIGS / "policies" / f"{name}.yaml").read_text(encoding="utf-8"))
    for part in (spec.get("scorer"), spec.get("allocator")):
        for argument, value in ((part or {}).get("init_args") or {}).items():
            if value == "reference":
                part["init_args"][argument] = made_up(argument, count, heads, group)
    return build_policy(spec, where=name)
