"""How much of what is retained a new token reads, where it reads chosen pages."""

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.page_selector import PageSelector
from learnkv.errors import UserError
from learnkv.policy.budget import entries_to_keep

EVERYTHING = 2**30
"""Tokens to read where a row's prompt is read whole, and what follows with it."""


def check_reading(evicts: bool, pages: PageSelector | None, read: float | None) -> None:
    """Raise unless `read` is a fraction for a policy that evicts and reads pages of the rest, and None for others."""
    if (read is not None) != (evicts and pages is not None) or (read is not None and not 0 < read <= 1):
        raise UserError(f"read={read}: expected a fraction, above 0 and at most 1, with a scorer and pages, else none")


def read_pages(
    selector: PageSelector, cache: CompressedCache, keep: float | None, budget: float | None, read: float
) -> None:
    """Let every new token read a fraction `read` of the budget, per head, in pages that `selector` chooses."""
    total = entries_to_keep(cache, 1, keep, budget)
    tokens = [max(round(one * read), 1) for one in total]
    whole = [EVERYTHING if one == n else one for one, n in zip(tokens, cache.prompt_lengths, strict=True)]
    for layer in cache.compressed_layers():
        layer.read_pages(selector, whole)
