"""Quest: pages whose keys may match the query."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.page_selector import PageSelector
from learnkv.errors import UserError
from learnkv.ops.page_bounds import GroupReduce, page_scores
from learnkv.ops.select import select_slots


class Quest(PageSelector):
    """The pages with the highest upper bound of query-key products (Quest, arXiv 2406.10774).

    The bound of a page is the sum over channels d of max(q_d * low_d, q_d * high_d), not scaled, where low and high are
    the smallest and largest value that a key of the page has in that channel.

    The authors' two implementations differ. The accuracy experiments read floor(min(entries, tokens) / page_size)
    pages, at least 3, among which the last one competes like any other. The kernels read floor(tokens / page_size), the
    last one always. Both leave out the first two layers and were written for as many kv heads as query heads; where
    several share one, the accuracy experiments repeat its keys, so that every query head chooses for itself.

    Args:
        page_size: entries of a page.
        rule: how many pages are read and whether the last one always is.
        group_reduce: over the bounds of the query heads that share a kv head, which then read the same pages; none:
            each has pages of its own, and a kv head's entries are read up to as often as query heads share it.
        dense_layers: number of first layers that read everything, beyond the budget.
    """

    status = "numbers"

    def __init__(
        self,
        page_size: int = 16,
        rule: Literal["kernel", "accuracy"] = "kernel",
        group_reduce: GroupReduce = "max",
        dense_layers: int = 2,
    ) -> None:
        super().__init__()
        if page_size < 1 or dense_layers < 0:
            raise UserError(
                f"page_size={page_size} dense_layers={dense_layers}: expected at least 1 entry and a number of layers"
            )
        self.page_size, self.rule, self.group_reduce, self.dense_layers = page_size, rule, group_reduce, dense_layers

    @property
    def _least(self) -> int:
        return 1 if self.rule == "kernel" else 3

    def count(self, entries: Tensor, tokens: Tensor) -> Tensor:
        wanted = tokens.unsqueeze(-1).expand_as(entries)
        if self.rule == "accuracy":
            wanted = torch.minimum(entries, wanted)
        pages = -(-entries // self.page_size)
        return torch.minimum((wanted // self.page_size).clamp(min=self._least), pages)

    def most(self, tokens: int) -> int:
        return max(tokens // self.page_size, self._least)

    def forward(self, query: Tensor, bounds: Tensor, entries: Tensor, tokens: Tensor, most: int) -> Tensor:
        count = self.count(entries, tokens).flatten()
        pages = -(-entries // self.page_size).flatten()
        scores = page_scores(query, bounds.flatten(0, 1), pages, self.group_reduce)
        lists = scores.shape[0] // len(pages)
        if self.rule == "kernel":
            last = (pages - 1).repeat_interleave(lists, output_size=len(scores)).unsqueeze(-1)
            scores = scores.scatter(1, last, torch.inf)
        return select_slots(scores, count.repeat_interleave(lists, output_size=len(scores)), most)
