"""Bytes that each row of a batch holds while its answer is written."""

from learnkv.cache.compressed_cache import CompressedCache


class HeldBytes:
    """The most bytes of each row so far: kept entries as they were stored after compression, and later tokens in full.

    Args:
        cache: after compression, before a token is read.
    """

    def __init__(self, cache: CompressedCache) -> None:
        rows = len(cache.prompt_lengths)
        self.token_nbytes = cache.full_nbytes / sum(cache.lengths)
        self.heads = sum(layer.heads for layer in cache.compressed_layers())
        nbytes = cache.full_nbytes if cache.budgets is None else cache.nbytes
        self.entry_nbytes = nbytes / sum(_kept(cache, self.heads))
        self.most = [0.0] * rows

    def update(self, cache: CompressedCache, rows: list[int]) -> None:
        """Count what the rows, numbers of the rows of the first batch, hold now."""
        is_token = cache.is_token()
        tail = is_token[:, is_token.shape[1] - cache.tail_length :].sum(-1).tolist()
        for row, kept, tokens in zip(rows, _kept(cache, self.heads), tail, strict=True):
            self.most[row] = max(self.most[row], kept * self.entry_nbytes + tokens * self.token_nbytes)


def _kept(cache: CompressedCache, heads: int) -> list[int]:
    """Entries of each row over all layers and heads, the tail not counted."""
    if cache.budgets is None:
        return [tokens * heads for tokens in cache.lengths]
    kept: list[int] = cache.budgets.sum((0, 2)).tolist()
    return kept
