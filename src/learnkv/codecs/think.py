"""ThinK: keys without the channels that matter least to queries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, Source
from learnkv.errors import UserError


class ThinK(Codec):
    """Keys without channels whose products with queries are small (ThinK, arXiv 2407.21018).

    Channel c of a row counts mean(q_c^2) * mean(k_c^2), over the last prompt queries of its query heads and over all of
    its keys; floor(ratio * D) channels are dropped and decode to 0, so that logits are those of the other channels. The
    authors repeat keys per query head and choose for each; here one choice serves the query heads of a row, as in
    kvpress, which drops channels of the latest keys, too (`recent=0`). A table of one byte for every channel that a row
    keeps is part of the bytes.

    Args:
        ratio: fraction of channels that are dropped.
        recent: latest keys that keep all channels.
        window: last queries that count.
    """

    status = "numbers"

    def __init__(self, ratio: float = 0.4, recent: int = 32, window: int = 32) -> None:
        super().__init__()
        if not 0 <= ratio < 1 or recent < 0 or window < 1:
            raise UserError(
                f"ratio={ratio} recent={recent} window={window}: expected a fraction below 1, a number of keys and at "
                "least one query"
            )
        self.ratio, self.recent, self.query_window = ratio, recent, window

    def channels(self, head_dim: int) -> int:
        """Channels that a row keeps."""
        return head_dim - int(self.ratio * head_dim)

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        if head_dim > 256:
            raise UserError(f"{self.name}: {head_dim} channels, expected at most 256, which a byte counts")
        kept = self.channels(head_dim)
        pruned = sum(self._pruned(entries))
        return len(entries) * kept + itemsize * (pruned * kept + (sum(entries) - pruned) * head_dim)

    def _pruned(self, entries: Sequence[int]) -> list[int]:
        return [max(count - self.recent, 0) for count in entries]

    def _encode(self, source: Source) -> dict[str, Tensor]:
        assert source.queries is not None
        dim, rows = source.entries.shape[-1], source.entries.split(list(source.lengths))
        pruned = self._pruned(source.lengths)
        kept = self._kept_channels(rows, source.queries.to(source.entries.device), dim)
        old = [row[:count][:, index] for row, count, index in zip(rows, pruned, kept, strict=True)]
        recent = [row[count:] for row, count in zip(rows, pruned, strict=True)]
        return {
            "channels": kept.to(torch.uint8),
            "pruned": torch.cat([source.entries[:0, : self.channels(dim)], *old]),
            "recent": torch.cat([source.entries[:0], *recent]),
        }

    def _kept_channels(self, rows: Sequence[Tensor], queries: Tensor, dim: int) -> Tensor:
        """[R, kept] int64, ascending."""
        if queries.shape[0] != len(rows) or queries.shape[-1] != dim:
            raise UserError(f"{self.name}: queries {list(queries.shape)} for {len(rows)} rows of {dim} channels")
        of_queries = queries[:, :, -self.query_window :].float().square().mean((1, 2))
        if not bool(of_queries.isfinite().all()):
            raise UserError(f"{self.name}: queries hold NaN or infinite numbers")
        of_keys = of_queries.new_zeros(of_queries.shape)
        for row, keys in enumerate(rows):
            of_keys[row] = keys.float().square().sum(0) / max(len(keys), 1)
        dropped = (of_queries * of_keys).topk(dim - self.channels(dim), largest=False).indices
        kept = torch.ones_like(of_queries, dtype=torch.bool).scatter(-1, dropped, False)
        return kept.nonzero()[:, 1].view(len(rows), self.channels(dim))

    def _decode(self, encoded: Encoded) -> Tensor:
        channels, old, recent = (encoded.tensors[name] for name in ("channels", "pruned", "recent"))
        pruned = self._pruned(encoded.entries)
        latest = [count - older for count, older in zip(encoded.entries, pruned, strict=True)]
        rows = [recent[:0].float()]
        for index, part, whole in zip(channels.long(), old.split(pruned), recent.split(latest), strict=True):
            zeros = torch.zeros(len(part), encoded.head_dim, dtype=torch.float32, device=part.device)
            rows += [zeros.index_copy(1, index, part.float()), whole.float()]
        return torch.cat(rows)
