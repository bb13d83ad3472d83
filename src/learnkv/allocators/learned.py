"""Learned budgets: head importance and layer budget on top of a heuristic allocation."""

from typing import Literal

import torch
from torch import Tensor, nn

from learnkv.allocators.conditioning import KNOTS, Conditioner, attention_features, interpolation_weights
from learnkv.core.allocator import Allocator, Baseline, entries_of, protected_of
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.allocate import allocate
from learnkv.ops.normal_scores import normal_scores
from learnkv.ops.ranked_counts import margins, ranked_counts
from learnkv.ops.round_to_budget import round_to_budget


class HeadImportance(nn.Module):
    """How much of its layer's budget each kv head gets: logits [L, B, H] that sum to 0 over the heads of a layer.

    Args:
        num_layers: L.
        num_heads: H, kv heads per layer.
        conditioned: add a correction from the prompt's attention features.
    """

    def __init__(self, num_layers: int, num_heads: int, conditioned: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(KNOTS), num_layers, num_heads, dtype=torch.float32))
        self.conditioner = Conditioner(num_layers * num_heads) if conditioned else None

    def forward(self, features: Tensor | None, keep: Tensor, entries: Tensor, layers: slice = slice(None)) -> Tensor:
        """Logits [L, B, H].

        Args:
            features: [L, B, H, 3] of these layers; None: unconditioned.
            keep, entries: [B] kept fraction and entries of each prompt.
            layers: which layers.
        """
        logits = torch.einsum("bm,mlh->lbh", interpolation_weights(keep), self.logits[:, layers])
        if self.conditioner is not None:
            assert features is not None
            batch, heads = features.shape[1:3]
            rows = features.transpose(0, 1).flatten(1, 2)  # [B, L*H, 3]
            corrections = self.conditioner(rows, keep, entries, heads * (layers.start or 0))
            logits = logits + corrections.view(batch, -1, heads).transpose(0, 1)
        return logits - logits.mean(-1, keepdim=True)


class LayerBudget(nn.Module):
    """How much of the budget each layer gets: logits [L, B, 1].

    Args:
        num_layers: L.
        conditioned: add a correction from the attention features of the prompt, averaged over heads.
    """

    def __init__(self, num_layers: int, conditioned: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(len(KNOTS), num_layers, dtype=torch.float32))
        self.conditioner = Conditioner(num_layers) if conditioned else None

    def forward(self, features: Tensor | None, keep: Tensor, entries: Tensor) -> Tensor:
        """From features [L, B, H, 3] (None: unconditioned), kept fraction [B] and entries [B] of each prompt."""
        logits = torch.einsum("bm,ml->lb", interpolation_weights(keep), self.logits)
        if self.conditioner is not None:
            assert features is not None
            logits = logits + self.conditioner(features.mean(2).transpose(0, 1), keep, entries).T
        return logits.unsqueeze(-1)


class LearnedAllocator(Allocator):
    """A heuristic's budgets plus learned corrections; they spend the same budget exactly.

    `by` shares: head importance and layer budget are added to the logits of the heuristic's shares, and one threshold,
    solved with its implicit gradient, brings the shares back to the budget: never below the protected entries, never
    above the prompt.

    `by` scores: budgets follow the prompt. Scores are taken relative to the last score within the heuristic's budget
    of each head, head importance and layer budget are added to them, and the best of all layers and heads are kept. A
    head whose learned scores rise gets more; the gradient is that of one soft top-k over the whole model.

    Corrections are zero at initialisation, where `round_to_budget` gives the heuristic's own integers.

    One ranking that decides how much each head gets is Ada-KV's idea (arXiv 2407.11550, within a layer), budgets that
    differ between layers PyramidKV's (arXiv 2406.02069, a fixed progression); learning both by distillation, from a
    heuristic on, is this project's own.

    Args:
        base: the heuristic allocation; it reads the heuristic's scores.
        num_layers: layers of the model; 0 until `train.py` fills in this and the next one.
        num_heads: kv heads per layer.
        conditioned: let both corrections depend on the prompt's attention as well as on the budget.
        window: last prompt queries whose attention is summarised, when conditioned.
        by: `shares` of the heuristic or the learned `scores`.
        heads: whether to learn a head importance.
        layers: whether to learn a layer budget.
    """

    def __init__(
        self,
        base: Allocator,
        num_layers: int = 0,
        num_heads: int = 0,
        conditioned: bool = False,
        window: int = 16,
        by: Literal["shares", "scores"] = "shares",
        heads: bool = True,
        layers: bool = True,
    ) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: expected at least 1")
        if by == "shares" and not (heads or layers):
            raise UserError("heads=false layers=false: leaves nothing to learn, expected one of them or by=scores")
        self.base, self.by_scores = base, by == "scores"
        self.shape = (num_layers, num_heads)
        self.head_importance = HeadImportance(num_layers, num_heads, conditioned) if heads else None
        self.layer_budget = LayerBudget(num_layers, conditioned) if layers else None
        self.conditioned = conditioned and (heads or layers)
        self.static = base.static and not self.conditioned and not self.by_scores
        self.window = max(base.window, window if self.conditioned else 0)
        self.functions, self.statistics = base.functions, base.statistics
        self._own_window = window

    @property
    def needs_scores(self) -> bool:
        return self.base.needs_scores or self.by_scores

    def features(self, obs: Observation) -> Tensor | None:
        """[B, H, 3 + F]: attention features, then the F features of the heuristic; None where there are neither."""
        base = self.base.features(obs)
        if not self.conditioned:
            return base
        own = attention_features(obs, self._own_window)
        return own if base is None else torch.cat([own, base], -1)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        return self.split(scores, features, budget, None)

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None) -> Tensor:
        layers, _, heads, _ = scores.shape
        total = torch.round(budget.double() * (layers * heads)).long()
        ranking = self.ranking(scores, features, budget, baseline)
        if ranking is not None:
            return ranked_counts(ranking, total)
        budgets, correction = self._corrections(scores, features, budget, baseline)
        rows, logits = (part.transpose(0, 1).flatten(1) for part in (budgets, correction.expand(budgets.shape)))
        wanted = corrected(rows, logits, total, entries_of(scores), protected_of(scores))
        return wanted.view(-1, layers, heads).transpose(0, 1)

    def ranking(
        self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None
    ) -> Tensor | None:
        if not self.by_scores:
            return None
        budgets, correction = self._corrections(scores, features, budget, baseline)
        if baseline is None:
            scores = scaled = _normal(scores)
        else:
            scaled = baseline.scaled
        return margins(scores, scaled, budgets) + correction.unsqueeze(-1)

    def _corrections(
        self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None
    ) -> tuple[Tensor, Tensor]:
        """The heuristic's budgets [L, B, H], and what is learned of them [L, 1 or B, H]."""
        layers, _, heads, _ = scores.shape
        if self.shape != (layers, heads):
            raise UserError(f"num_layers={self.shape[0]} num_heads={self.shape[1]}: the model has {layers} and {heads}")
        own, of_base = None, features
        if self.conditioned:
            assert features is not None
            own, of_base = features[..., : Conditioner.FEATURES], features[..., Conditioner.FEATURES :]
        total = torch.round(budget.double() * (layers * heads)).long()
        of_heuristic = scores if baseline is None else baseline.scores
        wanted = self.base(of_heuristic, of_base, budget)
        budgets = round_to_budget(wanted, entries_of(scores), total, protected_of(of_heuristic))
        parts = (self.head_importance, self.layer_budget)
        keep = budget.double() / entries_of(scores)
        correction = sum(
            (part(own, keep, entries_of(scores)) for part in parts if part is not None),
            scores.new_zeros(layers, 1, heads),
        )
        return budgets, correction


def _normal(scores: Tensor) -> Tensor:
    """A heuristic's scores [L, B, H, S] as normal scores of their ranks within each layer."""
    rows = scores.flatten(0, 1)
    normal = normal_scores(rows, rows.isfinite()).view_as(scores)
    return torch.where(scores.isfinite(), normal, scores)


def corrected(baseline: Tensor, logits: Tensor, total: Tensor, entries: Tensor, protected: Tensor) -> Tensor:
    """Wanted entries [B, N] of N heads: the shares of `baseline` with `logits` added, within their bounds and budget.

    Args:
        baseline: [B, N] entries of the heuristic.
        logits: [B, N] corrections; a constant added to a row changes nothing.
        total: [B] entries to spend, which may have a gradient.
        entries, protected: [B] the most and the least that a head gets.
    """
    most = entries.double()
    # Half a slot in all away from the bounds, where logits would be infinite; rounding to slots hides it.
    margin = 1 / (4 * most * baseline.shape[1])
    low = protected / most
    share = baseline / most[:, None]
    open_share = ((share - low[:, None]) / (1 - low[:, None])).clamp(margin[:, None], 1 - margin[:, None])
    shares = allocate(torch.logit(open_share) + logits.double(), total / (most * baseline.shape[1]), low)
    return shares * most[:, None]
