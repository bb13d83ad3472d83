"""Reading: how many entries of what is retained a decode step attends to."""

from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.entry_selector import AnySelector
from learnkv.errors import UserError
from learnkv.policy.budget import entries_to_keep

EVERYTHING = 2**30
"""Tokens to read where a row's prompt is read whole, and what follows with it."""


def check_read(evicts: bool, pages: AnySelector | None, read: float | None) -> None:
    """Raise unless `read` is a fraction for a policy that evicts and reads pages of the rest, and None for others."""
    if (read is not None) != (evicts and pages is not None) or (read is not None and not 0 < read <= 1):
        raise UserError(f"read={read}: expected a fraction, above 0 and at most 1, with a scorer and pages, else none")
    if evicts and pages is not None and pages.aligned:
        raise UserError(f"pages={pages.name}: expected a policy without a scorer, whose heads hold the whole prompt")


def read_pages(
    cache: CompressedCache, selector: AnySelector, read: float | None, keep: float | None, budget: float | None
) -> None:
    """Let every new token read a fraction `read` of the budget, per head, in pages that `selector` chooses."""
    lengths = cache.prompt_lengths
    shared: dict[str, Tensor] = {}
    tokens = [max(round(n * (1.0 if read is None else read)), 1) for n in entries_to_keep(lengths, 1, keep, budget)]
    tokens = [EVERYTHING if count == n else count for count, n in zip(tokens, lengths, strict=True)]
    for layer in cache.compressed_layers():
        layer.read_pages(selector, tokens, shared)
