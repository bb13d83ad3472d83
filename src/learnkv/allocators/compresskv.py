"""Layer budgets that follow what compressing each layer costs."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.formats import layers
from learnkv.formats.files import locate


class CompressKV(Allocator):
    """Layers get entries in proportion to their measured error, at least `minimum` each (CompressKV, arXiv 2508.02401).

    The error of a layer is how far compression moves the output of its attention, measured once per model. Of a budget
    of b entries per head: `minimum` for every layer, the rest by the errors' shares, at most `most` * b for a layer.

    Args:
        errors: JSON list of one error per layer, or `reference`.
        minimum: entries per head that every layer gets, at most half of the budget.
        most: a layer's limit, in multiples of the budget.
        rounding: `exact` spends the budget; `original` rounds and clips as the published code does, which then gives or
            takes single entries, the layer with the largest error first, until the total is met.
    """

    status = "numbers"
    table_argument = "errors"
    static = True

    def __init__(
        self,
        errors: str = "reference",
        minimum: int = 32,
        most: float = 3.0,
        rounding: Literal["exact", "original"] = "exact",
    ) -> None:
        super().__init__()
        if minimum < 0 or most < 1:
            raise UserError(f"minimum={minimum} most={most}: expected minimum >= 0 and most >= 1")
        self.source, self.minimum, self.most, self.rounding = errors, minimum, most, rounding
        self.errors: Tensor  # [L] float64, sums to 1
        measured = layers.read(locate(errors, "layer_errors.json"))
        self.register_buffer("errors", measured / measured.sum(), persistent=False)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        count, batch, heads, _ = scores.shape
        if len(self.errors) != count:
            raise UserError(
                f"errors={self.source}: holds {len(self.errors)} layers, the model has {count}; "
                "learnkv calibrate model=MODEL out=FOLDER makes the file of another model"
            )
        budget = budget.double()
        if self.rounding == "original":
            wanted = torch.tensor([self._whole(round(row)) for row in budget.tolist()], device=scores.device).T.double()
        else:
            low = (budget / 2).clamp(max=self.minimum)
            wanted = low + self.errors.unsqueeze(-1) * (budget - low) * count  # [L, B]
            wanted = wanted.minimum(self.most * budget)
        return wanted.unsqueeze(-1).expand(count, batch, heads)

    def _whole(self, budget: int) -> list[int]:
        """Entries of every layer that sum to L * budget."""
        errors, most = self.errors.tolist(), round(self.most * budget)
        free = len(errors) * (budget - self.minimum)
        wanted = [min(max(self.minimum + round(error * free), self.minimum), most) for error in errors]
        order = sorted(range(len(errors)), key=lambda layer: -errors[layer])
        missing = len(errors) * budget - sum(wanted)
        step = 1 if missing > 0 else -1
        while missing:
            movable = [layer for layer in order if self.minimum <= wanted[layer] + step <= most][: abs(missing)]
            if not movable:
                break
            for layer in movable:
                wanted[layer] += step
            missing -= step * len(movable)
        return wanted
