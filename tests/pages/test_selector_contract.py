"""What a cache relies on, for every page selector there is."""

from typing import Any

import pytest
import torch
from support.observations import subclasses
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import learnkv.pages
from learnkv.ops.arguments import Ragged
from learnkv.ops.page_bounds import empty_bounds, page_bounds
from learnkv.pages import PageSelector, Quest

SELECTORS = subclasses(learnkv.pages, PageSelector)
every_selector = pytest.mark.parametrize("cls", SELECTORS)
HEADS, GROUP, DIM = 2, 3, 16


def problem(selector: PageSelector, entries: list[int], tokens: list[int], spare: int = 0) -> tuple[Any, ...]:
    """Arguments of a selector: rows whose heads hold so many entries, with room for `spare` more pages."""
    batch, generator = len(tokens), torch.Generator().manual_seed(0)
    length = torch.tensor(entries)
    pages = -(-max(entries) // selector.page_size) + spare
    keys = torch.randn(max(entries) + 1, DIM, generator=generator)
    bounds = empty_bounds(keys, batch * HEADS, 2, pages, DIM)
    nowhere = torch.zeros(batch * HEADS, dtype=torch.long)
    page_bounds(Ragged(keys, keys, nowhere, length, max(entries)), nowhere, bounds, selector.page_size)
    query = torch.randn(1, HEADS * GROUP, DIM, generator=generator).expand(batch, -1, -1)
    most = min(selector.most(max(tokens)), pages)
    return query, bounds.unflatten(0, (batch, HEADS)), length.view(batch, HEADS), torch.tensor(tokens), most


def listed(pages: Tensor) -> list[list[int]]:
    return [[page for page in row if page >= 0] for row in pages.tolist()]


def test_the_walk_finds_the_selectors() -> None:
    assert Quest in SELECTORS


@every_selector
def test_lists_are_ascending_and_as_long_as_announced(cls: type[Any]) -> None:
    selector = cls()
    query, bounds, entries, tokens, most = problem(selector, [130, 47, 5, 260], [64, 100])
    pages = selector(query, bounds, entries, tokens, most)
    assert pages.dtype == torch.int32
    assert pages.shape[1] <= most
    assert pages.shape[0] in (entries.numel(), entries.numel() * GROUP)
    lists = pages.shape[0] // entries.numel()
    held = -(-entries // selector.page_size).flatten().repeat_interleave(lists)
    count = selector.count(entries, tokens).flatten().repeat_interleave(lists)
    for row, many, there, numbers in zip(pages.tolist(), count.tolist(), held.tolist(), listed(pages), strict=True):
        assert len(numbers) == many >= 1
        assert numbers == sorted(set(numbers))
        assert numbers[-1] < there
        assert row == numbers + [-1] * (len(row) - len(numbers))
        assert many * selector.page_size <= 100 + selector.page_size


@every_selector
def test_a_row_gets_what_it_gets_alone(cls: type[Any]) -> None:
    selector = cls()
    together = listed(selector(*problem(selector, [300, 130, 70, 5], [150, 48], spare=3)))
    alone = listed(selector(*problem(selector, [300, 130], [150])))
    alone += listed(selector(*problem(selector, [70, 5], [48])))
    assert together == alone


@every_selector
def test_whoever_may_read_everything_does(cls: type[Any]) -> None:
    selector = cls()
    pages = listed(selector(*problem(selector, [32, 128], [10_000])))
    assert {len(row) for row in pages} == {32 // selector.page_size, 128 // selector.page_size}


@every_selector
def test_nothing_waits_for_the_device(cls: type[Any]) -> None:
    selector, syncs = cls(), []
    given = problem(selector, [130, 47], [64])

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: tuple[Any, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> int | Tensor | tuple[Tensor, Tensor]:
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"):
                syncs.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        selector(*given)
    assert not syncs
