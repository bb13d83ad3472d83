"""Learned budgets: head importance and layer budget on top of a heuristic allocation."""

import torch
from torch import Tensor, nn

from learnkv.allocators.base import Allocator
from learnkv.allocators.conditioning import KNOTS, Conditioner, attention_features, hats
from learnkv.errors import UserError
from learnkv.observation import Observation
from learnkv.ops.allocate import allocate
from learnkv.ops.fit import fit


class HeadImportance(nn.Module):
    """How much of its layer's budget each kv head deserves: logits [L, B, H] that sum to 0 over the heads of a layer.

    Args:
        num_layers: L.
        num_heads: H, kv heads per layer.
        conditioned: add a correction from the attention features of the prompt.
    """

    def __init__(self, num_layers: int, num_heads: int, conditioned: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(KNOTS), num_layers, num_heads))
        self.conditioner = Conditioner(num_layers * num_heads) if conditioned else None

    def forward(self, features: Tensor | None, keep: Tensor, entries: Tensor, layers: slice = slice(None)) -> Tensor:
        """From features [L, B, H, 3] (None: unconditioned), kept fraction [B] and entries [B] of each prompt; of some
        `layers`, whose features alone are given then."""
        logits = torch.einsum("bm,mlh->lbh", hats(keep), self.logits[:, layers])
        if self.conditioner is not None:
            assert features is not None
            batch, heads = features.shape[1:3]
            rows = features.transpose(0, 1).flatten(1, 2)  # [B, L*H, 3]
            corrections = self.conditioner(rows, keep, entries, heads * (layers.start or 0))
            logits = logits + corrections.view(batch, -1, heads).transpose(0, 1)
        return logits - logits.mean(-1, keepdim=True)


class LayerBudget(nn.Module):
    """How much of the budget each layer deserves: logits [L, B, 1].

    Args:
        num_layers: L.
        conditioned: add a correction from the attention features of the prompt, averaged over heads.
    """

    def __init__(self, num_layers: int, conditioned: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(KNOTS), num_layers))
        self.conditioner = Conditioner(num_layers) if conditioned else None

    def forward(self, features: Tensor | None, keep: Tensor, entries: Tensor) -> Tensor:
        """From features [L, B, H, 3] (None: unconditioned), kept fraction [B] and entries [B] of each prompt."""
        logits = torch.einsum("bm,ml->lb", hats(keep), self.logits)
        if self.conditioner is not None:
            assert features is not None
            logits = logits + self.conditioner(features.mean(2).transpose(0, 1), keep, entries).T
        return logits.unsqueeze(-1)


class LearnedAllocator(Allocator):
    """A heuristic's budgets moved by learned head importance and layer budget; they spend the same, exactly.

    The logit of the heuristic's share of a head is its starting point. Both corrections are added and one threshold,
    solved with its implicit gradient, brings the shares back to the budget: never below the protected entries, never
    above the prompt. Corrections start at zero, where `fit` gives the heuristic's own integers back.

    Args:
        base: the heuristic allocation to start from.
        num_layers: layers of the model; 0 until `train.py` fills in this and the next one.
        num_heads: kv heads per layer.
        conditioned: let both corrections depend on the prompt's attention as well as on the budget.
        window: last prompt queries whose attention is summarised, when conditioned.
    """

    def __init__(
        self, base: Allocator, num_layers: int = 0, num_heads: int = 0, conditioned: bool = False, window: int = 16
    ) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: expected at least 1")
        self.base = base
        self.head_importance = HeadImportance(num_layers, num_heads, conditioned)
        self.layer_budget = LayerBudget(num_layers, conditioned)
        self.conditioned = conditioned
        self.static = base.static and not conditioned
        self.window = max(base.window, window if conditioned else 0)
        self._own_window = window

    @property
    def ranks(self) -> bool:
        return self.base.ranks

    def features(self, seen: Observation) -> Tensor | None:
        """[B, H, 3 + F]: attention features, then the F features of the heuristic; None where neither wants any."""
        theirs = self.base.features(seen)
        if not self.conditioned:
            return theirs
        own = attention_features(seen, self._own_window)
        return own if theirs is None else torch.cat([own, theirs], -1)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, _ = scores.shape
        if self.head_importance.logits.shape[1:] != (layers, heads):
            have = self.head_importance.logits.shape
            raise UserError(f"num_layers={have[1]} num_heads={have[2]}: the model has {layers} and {heads}")
        own, theirs = None, features
        if self.conditioned:
            assert features is not None
            own, theirs = features[..., : Conditioner.FEATURES], features[..., Conditioner.FEATURES :]
        entries = (scores[0, :, 0] > -torch.inf).sum(-1)
        protected = (scores[0, :, 0] == torch.inf).sum(-1)
        total = torch.round(budget.double() * (layers * heads)).long()
        start = fit(self.base(scores, theirs, budget), entries, total, protected)

        keep = budget.double() / entries
        moved = self.layer_budget(own, keep, entries) + self.head_importance(own, keep, entries)
        first, by = (one.transpose(0, 1).flatten(1) for one in (start, moved))  # [B, L*H]
        return corrected(first, by, total, entries, protected).view(batch, layers, heads).transpose(0, 1)


def corrected(start: Tensor, logits: Tensor, total: Tensor, entries: Tensor, protected: Tensor) -> Tensor:
    """Wishes [B, N] of N heads: the shares `start` moved by `logits` and back to the budget, between their bounds.

    Args:
        start: [B, N] entries to start from.
        logits: [B, N] corrections; what is added to all of a row changes nothing.
        total: [B] entries to spend, which may have a gradient.
        entries, protected: [B] the most and the least that a head gets.
    """
    most = entries.double()
    # Half a slot in all of distance from the bounds, where logits would be infinite; rounding to slots hides it.
    margin = 1 / (4 * most * start.shape[1])
    low = protected / most
    share = start / most[:, None]
    open_share = ((share - low[:, None]) / (1 - low[:, None])).clamp(margin[:, None], 1 - margin[:, None])
    shares = allocate(torch.logit(open_share) + logits.double(), total / (most * start.shape[1]), low)
    return shares * most[:, None]
