"""Head budgets that follow the scores."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.allocators.uniform import Uniform
from learnkv.core.allocator import Allocator
from learnkv.core.observation import Observation
from learnkv.errors import UserError


class AdaKV(Allocator):
    """Splits each layer's budget by the highest scores among all its heads (Ada-KV, arXiv 2407.11550).

    A head gets as many entries as it has among the layer's best, mixed with its equal share of the layer so that no
    head is starved. Scores must be comparable between heads, as attention is.

    Args:
        base: budget of each layer; `Uniform` if not given.
        floor: weight of the equal share, 0 (scores alone) to 1 (equal shares).
        rounding: `exact` keeps each layer's total; `original` rounds heads as the authors' code does, to within a few
            entries of it; `kvpress` is another rule: a head's own best entries, `floor` of its equal share, are set
            aside, then all others compete for the rest of the layer's total.
        normalize: weight the scores of a head by the part of their sum that its equal share of entries would hold.
            Scores must be non-negative then.
        floor_of: the equal share is that of the `layer`, or of the `average` layer, as in LAVa's code, which moves
            layer budgets towards each other. KVCache-Factory normalizes by default, Ada-KV's authors do not.
    """

    status = "numbers"

    def __init__(
        self,
        base: Allocator | None = None,
        floor: float = 0.2,
        rounding: Literal["exact", "original", "kvpress"] = "exact",
        normalize: bool = False,
        floor_of: Literal["layer", "average"] = "layer",
    ) -> None:
        super().__init__()
        if not 0 <= floor <= 1:
            raise UserError(f"floor={floor}: expected 0 to 1")
        self.base = Uniform() if base is None else base
        self.window = self.base.window
        self.functions, self.statistics = self.base.functions, self.base.statistics
        self.floor = floor
        self.rounding = rounding
        self.normalize = normalize
        self.floor_of = floor_of

    def features(self, obs: Observation) -> Tensor | None:
        return self.base.features(obs)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        heads = scores.shape[2]
        protected = (scores == torch.inf).sum(-1)  # [L, B, H]
        entries = (scores > -torch.inf).sum(-1) - protected
        share = self.base(scores, features, budget).to(torch.float64).mean(-1, keepdim=True) - protected
        if self.rounding == "kvpress":
            return self._guaranteed(scores, share + protected)
        if self.rounding == "original":
            share = share.round()
            won = self._won(scores, share, heads * share[..., 0])
            # LAVa's code counts the observation window among what the floor is a part of.
            equal = share if self.floor_of == "layer" else budget.double().view(1, -1, 1).expand_as(share)
            # In float32, as published: what is rounded half to even depends on it.
            mixed = won.float() * (1 - self.floor) + (self.floor * equal).floor().float()
            spent = torch.where(share > entries, entries, mixed.round().minimum(entries))
            return spent.double() + protected
        share = share.clamp(min=0)
        won = self._won(scores, share, (heads * share[..., 0]).round().clamp(min=1)).double()
        won = won * (heads * share / won.sum(-1, keepdim=True).clamp(min=1))
        equal = share if self.floor_of == "layer" else share.mean(0, keepdim=True)
        return protected + (1 - self.floor) * won + self.floor * equal

    def _guaranteed(self, scores: Tensor, share: Tensor) -> Tensor:
        """Entries of each head among the layer's best, those that are kept in any case included, [L, B, H]."""
        place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        raised = scores.masked_fill(place < (self.floor * share).floor().unsqueeze(-1), torch.inf)
        return _best(raised, (scores.shape[2] * share[..., 0]).round()).sum(-1).double()

    def _won(self, scores: Tensor, share: Tensor, places: Tensor) -> Tensor:
        """How many of the `places` [L, B] best entries of a layer lie in each head, [L, B, H], protected ones apart."""
        free = torch.isfinite(scores)
        if self.normalize:
            scores = torch.where(free, scores * self._concentration(scores, free, share), -torch.inf)
        return (_best(scores.masked_fill(~free, -torch.inf), places) & free).sum(-1)

    @staticmethod
    def _concentration(scores: Tensor, free: Tensor, share: Tensor) -> Tensor:
        """Part of a head's score sum in its `share` [L, B, H] best entries, [L, B, H, 1]."""
        mass = scores.masked_fill(~free, 0.0)
        best = mass.sort(dim=-1, descending=True).values
        counted = torch.arange(best.shape[-1], device=best.device) < share.unsqueeze(-1)
        whole = mass.sum(-1, keepdim=True)
        return (best * counted).sum(-1, keepdim=True) / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def _best(scores: Tensor, places: Tensor) -> Tensor:
    """Mask [L, B, H, S] of the `places` [L, B] best entries of a layer."""
    flat = scores.flatten(2)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    among = torch.arange(flat.shape[-1], device=flat.device) < places.unsqueeze(-1)
    return torch.zeros_like(among).scatter_(-1, order, among).view_as(scores)
