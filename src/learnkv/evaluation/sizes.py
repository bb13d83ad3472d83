"""Bytes and entries of every row of a batch."""

from typing import Any

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.stored_bits import stored_bits
from learnkv.policy.policy import Policy


def full_sizes(cache: CompressedCache) -> list[dict[str, Any]]:
    """Sizes of each row in the full cache, without padding."""
    tokens = sum(cache.prompt_lengths)
    sizes = [cache.full_nbytes * n / tokens for n in cache.prompt_lengths]
    bits = str(8 * cache.compressed_layers()[0].dtype.itemsize)
    return [
        {"spent": 1.0, "coverage": 1.0, "read": 1.0, "prefills": 1.0}
        | {"bytes": size, "bytes_full": size, "precision": bits}
        for size in sizes
    ]


def release_captured(cache: CompressedCache) -> None:
    """Free what was captured for the scorers of other policies, so that it does not count as this policy's bytes."""
    for layer in cache.compressed_layers():
        if layer.decode_capture is None:
            layer.capture.forget()


def sizes_of(cache: CompressedCache, policy: Policy, budget: Budget) -> list[dict[str, Any]]:
    """Sizes of each row in a compressed cache, and the passes it took.

    Bytes are those of the row's entries, positions and tables; of what else the cache has, such as bounds of pages, a
    row has a share in proportion to the entries it kept, unless bytes were asked for or entries have fewer bits.
    """
    with_budgets = any(True for _ in policy.parameters())
    sizes, kept = full_sizes(cache), [share * n for share, n in zip(cache.spent, cache.prompt_lengths, strict=True)]
    coverage = cache.coverage
    own, exact = cache.row_nbytes(), budget.bytes is not None or policy.precision is not None
    other = 0 if exact else cache.nbytes - sum(own)
    for row, size in enumerate(sizes):
        extra_tokens = sum(cache.extra_pass_tokens[extra][row] for extra in policy.capture_spec.extra_passes)
        size["spent"], size["coverage"], size["read"] = cache.spent[row], coverage[row], cache.read[row]
        size["prefills"] = 1 + extra_tokens / cache.prompt_lengths[row]
        size["bytes"] = own[row] + other * kept[row] / sum(kept)
        if exact:
            size["precision"] = policy.precision_name
        if with_budgets and cache.budgets is not None:
            size["budgets"] = (cache.budgets[:, row] / cache.prompt_lengths[row]).tolist()
        if policy.precision is not None and policy.precision.shares_bytes:
            size |= stored_bits(cache, row)
    return sizes
