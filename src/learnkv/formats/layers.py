"""One number per layer: budgets or errors as a JSON list, the first layer first.

A budget of a layer is one for all of its heads, as an engine with one table of pages per layer or request needs it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, table, write_text
from learnkv.ops.round_to_budget import round_to_budget


def read(path: str | Path) -> Tensor:
    """The numbers [L], float64.

    Raises:
        UserError: no such file, no list of numbers, a number below 0, or nothing above it.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: expected a list of one number per layer, got {type(content).__name__}")
    numbers = table(path, [content], "numbers")[0]
    if bool((numbers < 0).any()) or not bool(numbers.sum() > 0):
        raise UserError(f"{path}: expected numbers of at least 0, one of them above it")
    return numbers


def paged(shares: Sequence[float], keep: float, tokens: int, page: int) -> list[int]:
    """Tokens that every head of a layer keeps of a prompt: whole pages, together at most `keep` of all.

    Args:
        shares: [L] kept fractions; their proportions count.
        keep: fraction of all layers' tokens, of which whole pages are spent.
        tokens: length of the prompt.
        page: tokens per page.

    Raises:
        UserError: for less than a page per layer.
    """
    if keep == 1:
        return [tokens] * len(shares)
    count, most = len(shares), -(-tokens // page)
    total = min(int(keep * tokens * count + 1e-6) // page, count * most)
    if total < count:
        raise UserError(
            f"keep={keep:g} tokens={tokens} page={page}: {total} pages for {count} layers, expected one for each"
        )
    wanted = torch.tensor(shares, dtype=torch.float64).view(-1, 1, 1)
    pages = round_to_budget(wanted, *(torch.tensor([number]) for number in (most, total, 1)))
    return [min(number * page, tokens) for number in pages.flatten().tolist()]


def write(path: str | Path, numbers: Sequence[float]) -> Path:
    """Write one number per layer."""
    return write_text(path, json.dumps(list(numbers)) + "\n")
