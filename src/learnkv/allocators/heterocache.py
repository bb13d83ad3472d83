"""Whole caches for heads whose attention moves, and for those that lead others."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, check_table, entries_of, protected_of
from learnkv.formats import heterocache
from learnkv.formats.files import locate
from learnkv.ops.head_taxonomy import base_entries

MAKE = "learnkv calibrate model=MODEL out=FOLDER only=head_kinds makes the file of another model"


class HeteroCache(Allocator):
    """Pivots and volatile heads keep the prompt, the others by how unstable they are (HeteroCache, arXiv 2601.13684).

    A head is volatile where its best entries change while tokens are decoded, else an anchor; heads that attend to the
    same entries are satellites of a pivot. Of N kv heads N_f keep all T entries, and an anchor or satellite of weight w
    gets b * w of them, at most T, with b = (rho N - N_f) T / (N - N_f); weights are in proportion to 1/stability and 1
    on average. Where the budget does not hold the N_f heads, these share it, and the others keep what is protected.

    This is the prefill half of the method, which evicts. The other half, where satellites are loaded again from a whole
    cache, is `pages.HeteroCache`.

    Args:
        kinds: file of the heads' kinds, or `reference`.
        rounding: `exact` spends the budget; `original` rounds b and b * w down, as the authors do.
    """

    status = "numbers"
    table_argument = "kinds"
    static = True

    def __init__(self, kinds: str = "reference", rounding: Literal["exact", "original"] = "exact") -> None:
        super().__init__()
        table = heterocache.read(locate(kinds, "head_kinds.json"))
        self.source, self.rounding = kinds, rounding
        self.weights: Tensor  # [L, H] float64, -1 for heads that keep everything
        self.register_buffer("weights", table.weights.double().masked_fill(table.full, -1.0), persistent=False)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        check_table(self.weights, scores, f"kinds={self.source}", MAKE)
        entries, weights = entries_of(scores).double(), self.weights.unsqueeze(1)  # [B], [L, 1, H]
        whole = (weights < 0).expand(-1, len(entries), -1)
        base = base_entries(self.weights, entries, budget.double() / entries, self.rounding == "original")
        own = base.view(1, -1, 1) * weights
        if self.rounding == "original":
            own = own.trunc()
        own = own.maximum(protected_of(scores).double().view(1, -1, 1)).minimum(entries.view(1, -1, 1))
        return torch.where(whole, entries.view(1, -1, 1), own)
