"""LogQuant: the latest entries and, ever more sparsely, older ones at full precision."""

from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.codecs.partly_exact import PartlyExact
from learnkv.codecs.per_token import PerToken
from learnkv.core.codec import ScaleDtype
from learnkv.errors import UserError


class LogSparse(NamedTuple):
    """Entries at full precision, by rank in their row."""

    log: list[int]
    """Older ones, ascending: half as dense in every window that passes."""
    local: list[int]
    """The latest."""

    @classmethod
    def of_prompt(cls, entries: int, window: int) -> "LogSparse":
        """Those of `entries` that are there at once."""
        ranks = list(range(entries))
        if len(ranks) <= window:
            return cls([], ranks)
        log, local = ranks[:window], ranks[window:]
        while len(ranks) >= 3 * window:
            log, local = ranks[: 2 * window : 2], ranks[2 * window :]
            ranks = log + local
        return cls(log, local)

    def append(self, rank: int, window: int) -> "LogSparse":
        """Those after one more entry."""
        log, local = self.log, [*self.local, rank]
        if len(local) > 2 * window:
            log = (log + local[:window])[::2] if log else local[:window]
            local = local[window:]
        return LogSparse(log, local)


class LogQuant(PartlyExact):
    """Codes per token; full precision for at most three windows of entries, log-sparse (LogQuant, arXiv 2503.19950).

    The published code stores all entries before the latest in codes as well, and codes the decoded prefix again with
    every window that passes. Here an entry is coded once, and not where it is exact.

    Args:
        bits: of a code.
        window: W.
        log: whether older entries stay at full precision, too. The published partial variant has them for keys only;
            of values it leaves the 1 to W latest that do not fill a window.
        group: channels with one scale; None: all.
        scale_dtype: of scales and zeros.
    """

    status = "numbers"

    def __init__(
        self,
        bits: int = 2,
        window: int = 128,
        log: bool = True,
        group: int | None = 64,
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        super().__init__(PerToken(bits, "none", group, scale_dtype=scale_dtype))
        if window < 1:
            raise UserError(f"window={window}: expected at least one entry")
        self.window, self.log = window, log

    def exact(self, entries: int) -> Tensor:
        if not self.log:
            return torch.arange(entries) >= (entries - 1) // self.window * self.window
        parts = LogSparse.of_prompt(entries, self.window)
        mask = torch.zeros(entries, dtype=torch.bool)
        mask[parts.log + parts.local] = True
        return mask
