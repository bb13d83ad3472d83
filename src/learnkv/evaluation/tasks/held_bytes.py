"""Bytes that each row of a batch holds while its answer is written."""

from learnkv.cache.compressed_cache import CompressedCache


class HeldBytes:
    """The most bytes of each row so far, as the cache counts them.

    A cache from which nothing was evicted counts as an ordinary one: keys and values of its tokens.

    Args:
        cache: after compression, before a token is read.
    """

    def __init__(self, cache: CompressedCache) -> None:
        self.most = [0] * len(cache.prompt_lengths)

    def update(self, cache: CompressedCache, rows: list[int]) -> None:
        """Count what the rows, numbers of the rows of the first batch, hold now."""
        for row, nbytes in zip(rows, _row_nbytes(cache), strict=True):
            self.most[row] = max(self.most[row], nbytes)


def _row_nbytes(cache: CompressedCache) -> list[int]:
    layers = cache.compressed_layers()
    if cache.budgets is not None or any(layer.page_index is not None for layer in layers):
        return cache.row_nbytes_with_tail()
    token_nbytes = sum(layer.token_nbytes for layer in layers)
    tokens = cache.is_token().sum(-1).tolist()
    return [nbytes + new * token_nbytes for nbytes, new in zip(cache.row_full_nbytes(), tokens, strict=True)]
