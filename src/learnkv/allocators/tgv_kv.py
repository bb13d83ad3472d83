"""Layer budgets by how much text attends to images."""

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.text_attention import text_attention


class TGVKV(Allocator):
    """Layer budgets in proportion to the attention that text gives to images (TGV-KV, arXiv 2606.03075).

    The share of a layer is the sum of its attention, averaged over heads, from text to the tokens of images, over that
    of all layers (text-vision budgeting). What differs: the authors sum over all text behind the image, here over the
    last `window` queries; and where a layer's share exceeds the prompt or falls below what is protected, the rest goes
    to the other layers, so that the budget is spent. Prompts without images are split evenly.

    Args:
        window: number of last prompt queries.
    """

    def __init__(self, window: int = 64) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: TGV-KV needs at least one query")
        self.window = window

    def features(self, obs: Observation) -> Tensor:
        """[B, H, 1]: attention from text to images that goes to a kv head."""
        if not obs.aligned:
            raise UserError("TGVKV: which entries are images is not known after heads have evicted: evict_interval=0")
        weights, _ = obs.window_attention(self.window)
        queries = obs.query_positions[:, -self.window :]
        attention, _, is_image = text_attention(weights, queries, obs.valid, obs.is_image)
        return attention.sum(2).masked_fill(~is_image, 0.0).sum(-1, keepdim=True).float()

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        assert features is not None
        layers, batch, heads, _ = scores.shape
        mass = features.double().mean((2, 3))
        total = mass.sum(0)
        share = torch.where(total > 0, mass / total.clamp_min(1e-300), 1 / layers)
        return (share * budget.double() * layers).unsqueeze(-1).expand(layers, batch, heads)
