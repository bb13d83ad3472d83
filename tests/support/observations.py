"""Made-up observations and the classes that every contract test walks through."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from learnkv.core.observation import HiddenSample, Observation, PromptPass, Statistic
from learnkv.ops.rotary import Layout, Rotary
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def observe(
    lengths: list[int],
    *,
    window: int = 8,
    heads: int = 2,
    group: int = 3,
    dim: int = 16,
    layer_idx: int = 1,
    seed: int = 0,
    statistics: Iterable[Statistic] = (),
    extra_passes: Iterable[PromptPass] = (),
    sample: HiddenSample | None = None,
    terms: SoftmaxTerms = NO_TERMS,
) -> Observation:
    """A batch of left-padded rows with these lengths; whatever is padding is NaN. A row depends on its length and seed.

    The second quarter of every row is an image.

    `rope` of the result is the identity: tests that care bring their own. `statistics` are gathered from all queries,
    `extra_passes` result in the norms of the keys, and `sample` has the hidden states of its tokens.
    """
    slots = max(lengths)
    shapes = {"queries": (heads * group, dim), "keys": (heads, dim), "values": (heads, dim), "hidden": (1, 2 * dim)}
    rows: dict[str, list[Tensor]] = {name: [] for name in shapes}
    ids = torch.zeros(len(lengths), slots, dtype=torch.long)
    for length in lengths:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        for name, (width, depth) in shapes.items():
            row = torch.full((width, slots, depth), torch.nan)
            row[:, slots - length :] = torch.randn(width, length, depth, generator=generator)
            rows[name].append(row)
        generator = torch.Generator().manual_seed(7000 * seed + length)
        ids[len(rows["keys"]) - 1, slots - length :] = torch.randint(97, (length,), generator=generator)
    made = {name: torch.stack(row) for name, row in rows.items()}
    positions = torch.arange(slots) - slots + torch.tensor(lengths).unsqueeze(-1)
    quarter = torch.tensor(lengths).unsqueeze(-1) // 4
    window, unrotated = min(window, slots), Layout.halves(dim // 2)
    whole = Observation(
        layer_idx=layer_idx,
        queries=made["queries"],
        query_positions=positions,
        keys=made["keys"],
        values=made["values"],
        scaling=dim**-0.5,
        terms=terms,
        valid=(positions >= 0).unsqueeze(1).expand(-1, heads, -1),
        positions=positions.unsqueeze(1).expand(-1, heads, -1),
        project=lambda: torch.randn(2 * dim, heads * group * dim, generator=torch.Generator().manual_seed(seed)),
        hidden=made["hidden"][:, 0],
        token_ids=ids,
        is_image=(positions >= quarter) & (positions < 2 * quarter),
        keep=torch.full((len(lengths),), 0.25, dtype=torch.float64),
        rotation=lambda: Rotary(((torch.ones(1, slots, dim // 2), torch.zeros(1, slots, dim // 2)),), unrotated),
    )
    gathered = [*statistics] if sample is None else [*statistics, sample]
    norms = whole.keys.norm(dim=-1, keepdim=True).nan_to_num()
    return dataclasses.replace(
        whole,
        queries=whole.queries[:, :, slots - window :],
        query_positions=positions[:, slots - window :],
        statistics={statistic: statistic.update(whole, None) for statistic in gathered}
        | dict.fromkeys(extra_passes, norms),
        sample=sample,
    )


def permuted(obs: Observation, order: list[int]) -> Observation:
    """The same layer with its kv heads in another order, their query heads with them."""
    queries = obs.queries.unflatten(1, (obs.keys.shape[1], -1))[:, order].flatten(1, 2)
    heads = {name: getattr(obs, name)[:, order] for name in ("keys", "values", "valid", "positions")}
    weight = obs.projection.unflatten(1, (len(order), -1))[:, order].flatten(1)
    statistics = {key: tensor[:, order] for key, tensor in obs.statistics.items()}
    return dataclasses.replace(obs, queries=queries, project=lambda: weight, statistics=statistics, **heads)


def subclasses(package: ModuleType, base: type) -> list[type]:
    """Concrete subclasses of `base` in all files of `package`, by name."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
    classes: set[type[Any]] = set()
    todo: list[type[Any]] = [base]
    while todo:
        children = [c for c in todo.pop().__subclasses__() if c.__module__.startswith(package.__name__)]
        classes.update(child for child in children if not inspect.isabstract(child))
        todo += children
    return sorted(classes, key=lambda child: child.__name__)


def randomised(module: AnyModule) -> AnyModule:
    """The module with every parameter drawn at random, so that nothing learned is at its start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)
