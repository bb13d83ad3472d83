"""Head budgets in proportion to measured head scores."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, check_table, protected_of
from learnkv.errors import UserError
from learnkv.formats import headkv
from learnkv.formats.files import locate

MAKE = "learnkv calibrate model=MODEL out=FOLDER makes the file of another model"


class HeadKV(Allocator):
    """All heads share the part 1/beta of the budget by their scores, the rest equally (HeadKV, arXiv 2410.19258).

    Of a budget of b free entries per head, a pool of x = b/beta per head is dealt out over all layers and heads in
    proportion to p, the scores raised to `temperature` and divided by their sum: p * x * L*H + (b - x). A kv head gets
    the mean of its query heads.

    The authors' code takes the observation window out of b and rounds x down (in floating point, so that 143 // 1.1
    is 129); KVCache-Factory's port leaves the window in b, so that its heads keep a window more. Both lose what a head
    cannot hold; here others get it.

    `table: logit_heads` are LOCOS' scores (arXiv 2607.01002): what a head adds to the logit of the answer. Their mean
    may be below zero, in heads that work against the answer; these count as 0 (`negative: zero`). How query heads are
    reduced to kv heads is not published.

    Args:
        scores: file of head scores, or `reference`.
        beta: 1/beta of the budget follows the scores; close to 1 means nearly all of it.
        temperature: exponent of the scores' shares.
        rounding: `exact` spends the budget; `original` rounds as the published code does.
        table: which scores `reference` names: retrieval scores, or LOCOS' contributions to the logit.
        negative: whether mean scores below zero are refused or count as 0.
        group_reduce: over the query heads of a kv head.
    """

    status = "numbers"
    table_argument = "scores"
    static = True

    def __init__(
        self,
        scores: str = "reference",
        beta: float = 1.01,
        temperature: float = 1.0,
        rounding: Literal["exact", "original"] = "exact",
        table: Literal["head_scores", "logit_heads"] = "head_scores",
        negative: Literal["refuse", "zero"] = "refuse",
        group_reduce: Literal["mean", "max"] = "mean",
    ) -> None:
        super().__init__()
        if beta < 1:
            raise UserError(f"beta={beta}: expected 1 or more")
        self.source, self.beta, self.rounding, self.group_reduce = scores, beta, rounding, group_reduce
        file = locate(scores, f"{table}.json")
        measured = headkv.mean_scores(headkv.read(file))
        if negative == "zero":
            measured = measured.clamp_min(0)
        if bool((measured < 0).any()) or not bool(measured.sum() > 0):
            raise UserError(f"{file}: expected scores of at least 0, one of them above it")
        share = (measured / measured.sum()) ** temperature
        self.importance: Tensor  # [L, H*G] float64, sums to 1
        self.register_buffer("importance", share / share.sum(), persistent=False)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        check_table(self.importance, scores, f"scores={self.source}", MAKE, per_query_head=True)
        group = self.importance.shape[-1] // scores.shape[2]
        protected = protected_of(scores).view(1, -1, 1)
        importance = self.importance.unsqueeze(1)  # [L, 1, H*G]
        free = budget.double().view(1, -1, 1) - protected
        if self.rounding == "original":
            pool = torch.floor_divide(free, self.beta)
            table = (importance * (pool * self.importance.numel()) + (free - pool)).round()
            return self._of_groups(table, group).round() + protected
        free = free.clamp_min(0)
        pool = free / self.beta
        table = importance * pool * self.importance.numel() + (free - pool)
        return self._of_groups(table, group) + protected

    def _of_groups(self, table: Tensor, group: int) -> Tensor:
        """[L, B, H] of the query heads' [L, B, H*G]."""
        grouped = table.unflatten(-1, (-1, group))
        reduced: Tensor = grouped.mean(-1) if self.group_reduce == "mean" else grouped.amax(-1)
        return reduced
