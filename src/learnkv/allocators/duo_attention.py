"""Retrieval heads keep everything, streaming heads the first and the latest tokens."""

import math
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, check_table, entries_of
from learnkv.errors import UserError
from learnkv.formats import duo
from learnkv.formats.files import locate

MAKE = "learnkv calibrate model=MODEL out=FOLDER makes the gates of another model"


class DuoAttention(Allocator):
    """Retrieval heads keep the prompt, streaming heads sinks and recent tokens (DuoAttention, arXiv 2410.10819).

    A gate is how much a kv head needs its whole cache. Streaming heads get `sink + recent` entries; as many of the
    others as the budget allows keep the whole prompt, the highest gate first (ties by layer and head); the next gets
    the remainder. A budget below `sink + recent` is shared equally. Belongs on scores that rank the first
    `sink` tokens and then the latest ones (`StreamingLLM`).

    Where the authors' streaming heads go on sliding while tokens are generated, here what was kept of the prompt stays.

    Args:
        gates: folder of a pattern, or `reference`.
        sink: first tokens of a streaming head; None: from the pattern's config.json.
        recent: latest tokens of a streaming head; None: from the pattern's config.json.
        sparsity: part of the heads that stream, whatever the budget; the budget then scales what all of them keep.
            None: as the budget requires.
        counting: how many heads a sparsity means: `original` the gates below their linearly interpolated quantile,
            `kvpress` that part of the heads, rounded half to even. Published gates are tied at many places: the
            authors break ties by noise, kvpress by an unstable sort, we by layer and head.
    """

    status = "numbers"
    table_argument = "gates"
    trained = True
    static = True

    def __init__(
        self,
        gates: str = "reference",
        sink: int | None = None,
        recent: int | None = None,
        sparsity: float | None = None,
        counting: Literal["original", "kvpress"] = "original",
    ) -> None:
        super().__init__()
        if sparsity is not None and not 0 <= sparsity <= 1:
            raise UserError(f"sparsity={sparsity}: expected 0 to 1")
        pattern = duo.read(locate(gates, "duo"))
        self.source, self.sparsity, self.counting = gates, sparsity, counting
        self.sink = pattern.sink if sink is None else sink
        self.recent = pattern.recent if recent is None else recent
        if self.sink < 0 or self.recent < 0 or self.sink + self.recent == 0:
            raise UserError(f"sink={self.sink} recent={self.recent}: expected numbers of tokens, one of them above 0")
        self.gates: Tensor  # [L, H]; trained ones overstep [0, 1] a little
        self.register_buffer("gates", pattern.gates.clamp(0, 1), persistent=False)

    def streaming(self) -> Tensor:
        """[L, H] True for the heads that stream at this sparsity."""
        assert self.sparsity is not None
        count = self.gates.numel()
        # To nine decimals, because a product such as 255 * 0.2 may end an ulp above the whole number that is meant.
        number = round(count * self.sparsity)
        if self.counting == "original":
            number = count if self.sparsity == 1 else math.ceil(round((count - 1) * self.sparsity, 9))
        return self._rank() >= count - number

    def _rank(self) -> Tensor:
        """[L, H] place of every head by its gate, the highest first."""
        order = self.gates.flatten().argsort(descending=True, stable=True)
        place = torch.arange(len(order), device=order.device)
        return torch.empty_like(order).scatter_(0, order, place).view_as(self.gates)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        check_table(self.gates, scores, f"gates={self.source}", MAKE)
        entries = entries_of(scores).double().view(1, -1, 1)
        short = entries.clamp(max=self.sink + self.recent)
        if self.sparsity is not None:
            return torch.where(self.streaming().unsqueeze(1), short, entries)
        budget = budget.double().view(1, -1, 1)
        more = (budget - short).clamp_min(0) * self.gates.numel() - self._rank().unsqueeze(1) * (entries - short)
        return more.clamp_min(0).minimum(entries - short) + short.minimum(budget)
