"""Head budgets from a table made offline for each compression target."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, check_table, entries_of
from learnkv.formats import lukv
from learnkv.formats.files import locate

MAKE = "learnkv calibrate model=MODEL out=FOLDER makes the file of another model"


class LUKV(Allocator):
    """Fractions of each head to evict from a table, for a global target in whole percents (LU-KV).

    The row of the nearest target counts, halves rounded to even; the paper finds the tables by marginal utility, for
    one model and one scorer each. kvpress's use of the table is known here, the authors' own repository is not. There a
    layer keeps what its row of the table sums to, whatever the target was, each layer rounded for itself by largest
    remainder; here the requested budget is spent.

    Args:
        curve: `.npy` file [99, L, H] of fractions to evict, or `reference`.
        rounding: `exact` spends the budget; `original` rounds as kvpress does.
    """

    status = "numbers"
    table_argument = "curve"
    static = True

    def __init__(self, curve: str = "reference", rounding: Literal["exact", "original"] = "exact") -> None:
        super().__init__()
        self.source, self.rounding = curve, rounding
        self.curve: Tensor  # [99, L, H]
        self.register_buffer("curve", lukv.read(locate(curve, "lukv.npy")), persistent=False)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        check_table(self.curve, scores, f"curve={self.source}", MAKE)
        entries = entries_of(scores)
        # Decimals as they were typed: 1 - 0.855 is 0.14500000000000002, whose percent rounds to 15 instead of 14.
        evicted = torch.round(1 - budget.double() / entries, decimals=9)
        target = (torch.round(100 * evicted) - 1).clamp(0, lukv.TARGETS - 1).long()  # [B]
        kept = (1 - self.curve[target].float()).clamp(0, 1) * entries.view(-1, 1, 1)  # [B, L, H]
        if self.rounding == "original":
            kept = self._whole(kept, entries)
        return kept.transpose(0, 1).double()

    @staticmethod
    def _whole(kept: Tensor, entries: Tensor) -> Tensor:
        """Whole entries by largest remainder in each layer, then at least 1 and at most all of them."""
        heads = kept.shape[-1]
        total = kept.sum(-1).round().clamp_min(heads).minimum(heads * entries.view(-1, 1))
        whole = kept.floor()
        order = (kept - whole).argsort(dim=-1, descending=True, stable=True)
        missing = torch.arange(heads, device=kept.device) < (total - whole.sum(-1)).unsqueeze(-1)
        whole = whole + torch.zeros_like(whole).scatter_(-1, order, missing.to(whole.dtype))
        return whole.clamp_min(1).minimum(entries.view(-1, 1, 1).to(whole.dtype))
