"""Layer budgets from a file."""

from torch import Tensor

from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.formats import layers


class FixedLayers(Allocator):
    """Layer budgets from a file, equal for the heads of a layer; only their proportions count.

    Args:
        budgets: JSON list of one number per layer, as `learnkv export format=layers` writes it.
    """

    table_argument = "budgets"
    static = True

    def __init__(self, budgets: str) -> None:
        super().__init__()
        self.source = budgets
        self.budgets: Tensor  # [L]
        self.register_buffer("budgets", layers.read(budgets), persistent=False)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        count, batch, heads, _ = scores.shape
        if len(self.budgets) != count:
            raise UserError(f"budgets={self.source}: holds {len(self.budgets)} layers, the model has {count}")
        share = self.budgets / self.budgets.mean()
        return (share.view(-1, 1, 1) * budget.double().view(1, -1, 1)).expand(count, batch, heads)
