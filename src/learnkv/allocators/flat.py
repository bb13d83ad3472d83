"""One ranking over all layers and heads."""

import torch
from torch import Tensor

from learnkv.allocators.base import Allocator


class Flat(Allocator):
    """A head gets as many entries as it has among the best of the whole model.

    Scores must be comparable between layers. LayerDefensiveKV (`layer_defensivekv`) splits its budget this way, and
    KVzip nearly so: it keeps what lies strictly above a threshold, and so loses the entries that are tied with it. No
    head is given a floor. In LayerDefensiveKV's own code a layer of small scores may lose all its entries, the newest
    ones included; here the policy's sinks and recent tokens stay in every head and count towards the budget.
    """

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, slots = scores.shape
        places = torch.round(budget.double() * layers * heads).long()  # [B]
        flat = scores.transpose(0, 1).flatten(1)  # [B, L*H*S]
        order = flat.argsort(dim=-1, descending=True, stable=True)
        among = torch.arange(flat.shape[-1], device=flat.device) < places.unsqueeze(-1)
        best = torch.zeros_like(among).scatter_(-1, order, among) & (flat > -torch.inf)
        return best.view(batch, layers, heads, slots).sum(-1).transpose(0, 1).double()
