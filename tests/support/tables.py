"""Tables for models of any shape: what the policies that read a file need in a test."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from learnkv.formats import duo, headkv, heterocache, layers, lukv, tensors, unit_ends
from learnkv.ops.head_taxonomy import Taxonomy
from learnkv.ops.layer_router import router_shapes
from learnkv.ops.rotary import Layout
from learnkv.persistence.named_configs import CONFIGS
from learnkv.persistence.policies import build_policy
from learnkv.policy.policy import Policy

FOLDER = tempfile.TemporaryDirectory()


def _draw(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _curve(path: Path, count: int, heads: int) -> Path:
    evicted = torch.arange(1, 100).view(-1, 1, 1) / 100
    return lukv.write(path, evicted ** (0.5 + _draw(count, heads)))


def _moments(path: Path, count: int, heads: int, group: int, dim: int, hidden: int) -> Path:
    root = _draw(count, heads * group, dim, dim) - 0.5
    return tensors.write(path, {"mean": _draw(count, heads * group, dim), "covariance": root @ root.mT})


def _queries(path: Path, count: int, heads: int, group: int, dim: int, hidden: int) -> Path:
    queries, pairs = _draw(count, heads * group, 2 * dim) - 0.5, dim // 2
    frequency = 1e4 ** (-torch.arange(pairs) / pairs)
    made = {
        "mean": queries[..., :dim],
        "magnitude": torch.hypot(queries[..., :pairs], queries[..., pairs:dim]) + queries[..., dim : dim + pairs].abs(),
        "frequency": frequency.expand(count, -1),
        "scale": torch.ones(count, pairs),
        "layout": torch.tensor(Layout.halves(pairs)).expand(count, -1),
    }
    return tensors.write(path, made)


def _gate(path: Path, count: int, heads: int, group: int, dim: int, hidden: int) -> Path:
    sizes = {"L": count, "Q": heads * group * 4, "K": heads * 4, "E": hidden, "F": 4, "H": heads, "S": 3, "G": group}
    shapes = {name: [sizes.get(letter, 1) for letter in letters] for name, letters in tensors.KVZIP_GATE.items()}
    return tensors.write(path, {name: _draw(*shape) - 0.5 for name, shape in shapes.items()})


def _retention(path: Path, count: int, heads: int, group: int, dim: int, hidden: int) -> Path:
    sizes = {"L": count, "W": 5, "E": hidden, "H": heads}
    shapes = {name: [sizes[letter] for letter in letters] for name, letters in tensors.RETENTION.items()}
    return tensors.write(path, {name: _draw(*shape) - 0.5 for name, shape in shapes.items()})


def _indexer(path: Path, count: int, heads: int, group: int, dim: int, hidden: int) -> Path:
    sizes = {"L": count, "Q": heads * group * dim, "E": hidden, "F": 4, "I": 2, "R": 8}
    shapes = {name: [sizes[letter] for letter in letters] for name, letters in tensors.INDEXER.items()}
    return tensors.write(path, {name: _draw(*shape) - 0.5 for name, shape in shapes.items()})


def _kinds(path: Path, count: int, heads: int) -> Path:
    """The first layer begins with a pivot and its satellite, where there are two heads; all others are anchors."""
    kinds = torch.ones(count, heads, dtype=torch.long)
    pivots = torch.full_like(kinds, -1)
    order: list[list[int]] = [[] for _ in range(count)]
    if heads > 1:
        kinds[:, 0], kinds[:, 1], pivots[:, 1], order = 3, 4, 0, [[0]] * count
        kinds[1:, 0], kinds[1:, 1], pivots[1:], order[1:] = 1, 1, -1, [[]] * (count - 1)
    weights = torch.where(kinds == 3, -1.0, 0.5 + _draw(count, heads).double())
    return heterocache.write(path, Taxonomy(kinds, weights, pivots, order))


def _router(path: Path, count: int, dim: int) -> Path:
    draw = torch.Generator().manual_seed(count + dim)
    shapes = router_shapes(dim)
    return tensors.write(path, {name: torch.randn(count, *shape, generator=draw) for name, shape in shapes.items()})


MAKE: dict[str, Callable[..., Path]] = {
    "scores": lambda path, count, heads, group, *_: headkv.write(path, _draw(count, heads * group, 3).tolist()),
    "heads": lambda path, count, heads, group, *_: headkv.write(path, _draw(count, heads * group, 3).tolist()),
    "curve": lambda path, count, heads, group, *_: _curve(path, count, heads),
    "gates": lambda path, count, heads, group, *_: duo.write(path, _draw(count, heads), 2, 9),
    "errors": lambda path, count, heads, group, *_: layers.write(path, _draw(count).tolist()),
    "moments": _moments,
    "gate": _gate,
    "router": lambda path, count, heads, group, dim, hidden: _router(path, count, dim),
    "gains": lambda path, count, *_: layers.write(path, _draw(count).tolist()),
    "kinds": lambda path, count, heads, *_: _kinds(path, count, heads),
    "queries": _queries,
    "retention": _retention,
    "indexer": _indexer,
    "ends": lambda path, *_: unit_ends.write(
        path, {"sentence": range(0, 97, 5), "line": [5, 10, 60], "paragraph": [7]}
    ),
    "budgets": lambda path, count, heads, group, *_: layers.write(path, _draw(count).tolist()),
}
"""The argument that names a table -> what writes one for `count` layers of `heads` kv heads of `group` query heads of
`dim` channels, and hidden states of `hidden`."""


@functools.cache
def made_up(argument: str, count: int, heads: int, group: int, dim: int = 16, hidden: int = 32) -> str:
    """Path of a table that fits."""
    shape = (count, heads, group, dim, hidden)
    return str(MAKE[argument](Path(FOLDER.name) / "-".join(map(str, (argument, *shape))), *shape))


@functools.cache
def policy_of(name: str, *shape: int) -> Policy:
    """The policy of a YAML; tables of the reference model give way to some for this shape."""
    spec = yaml.safe_load((CONFIGS / "policies" / f"{name}.yaml").read_text(encoding="utf-8"))
    for part in (spec.get("scorer"), spec.get("allocator"), spec.get("pages")):
        for argument, value in ((part or {}).get("init_args") or {}).items():
            if value == "reference":
                part["init_args"][argument] = made_up(argument, *shape)
    return build_policy(spec, where=name)
