"""Learned budgets that are decided while the prompt is read, layer by layer."""

import torch
from torch import Tensor

from learnkv.allocators.conditioning import Conditioner, attention_features
from learnkv.allocators.learned import HeadImportance, LayerBudget, corrected
from learnkv.core.allocator import Allocator, SequentialAllocator, entries_of, protected_of
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_to_budget


class LearnedSequentialAllocator(SequentialAllocator):
    """A heuristic's budgets plus learned corrections that depend on the attention of the layers read so far.

    Stick-breaking: of what earlier layers left, a layer takes its weight over its own and the expected weights of the
    layers to come. Expected weights are the heuristic's budgets times learned factors; when a layer has been read, its
    attention, that of the layers before it and how much these left, relative to the expectation, correct its own. Heads
    share their layer's budget by the heuristic's split and learned head importance. A layer takes no more than it can
    hold, and no less than what later ones cannot, so that the budget is spent exactly, with a gradient. The
    construction is this project's own.

    Args:
        base: the heuristic: static, or `LayerByLayer` for heads that follow their scores.
        num_layers: layers of the model; 0 until `train.py` fills in this and the next one.
        num_heads: kv heads per layer.
        conditioned: read the prompt's attention. Otherwise budgets are learned for each kept fraction alone.
        window: last prompt queries whose attention is summarised, when conditioned.
    """

    def __init__(
        self, base: Allocator, num_layers: int = 0, num_heads: int = 0, conditioned: bool = True, window: int = 16
    ) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: expected at least 1")
        if not (base.static or base.sequential) or any(True for _ in base.parameters()):
            raise UserError(
                f"base={type(base).__name__}: expected a heuristic that needs no later layers: one that is static, "
                "or LayerByLayer"
            )
        self.base = base
        self.layer_budget = LayerBudget(num_layers)
        self.head_importance = HeadImportance(num_layers, num_heads, conditioned)
        own = Conditioner.FEATURES
        self.conditioner = Conditioner(num_layers, features=2 * own + 1) if conditioned else None
        self.window = max(base.window, window if conditioned else 0)
        self._own_window = window

    @property
    def needs_scores(self) -> bool:
        return self.base.needs_scores

    def features(self, obs: Observation) -> Tensor | None:
        """[B, H, 3 + F]: attention features, then the F features of the heuristic; None where there are neither."""
        base = self.base.features(obs)
        if self.conditioner is None:
            return base
        own = attention_features(obs, self._own_window)
        return own if base is None else torch.cat([own, base], -1)

    def baseline_budgets(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        shape = self.head_importance.logits.shape
        if shape[1:] != (layers, scores.shape[1]):
            raise UserError(f"num_layers={shape[1]} num_heads={shape[2]}: the model has {layers} and {scores.shape[1]}")
        return self.base.baseline_budgets(scores, layers, budget)

    def layer(
        self, layer_idx: int, baseline: Tensor, scores: Tensor, features: Tensor | None, earlier: Tensor
    ) -> Tensor:
        own, of_base = None, features
        if self.conditioner is not None:
            assert features is not None
            own, of_base = features[..., : Conditioner.FEATURES], features[..., Conditioner.FEATURES :]
        entries, protected = entries_of(scores.unsqueeze(0)), protected_of(scores.unsqueeze(0))
        total = self._layer_total(layer_idx, baseline, own, earlier, entries, protected)

        heads = self.base.layer(layer_idx, baseline, scores, of_base, earlier)
        budgets = round_to_budget(heads.unsqueeze(0), entries, baseline[layer_idx].sum(-1), protected)[0]
        own = None if own is None else own[layer_idx:]
        layers = slice(layer_idx, layer_idx + 1)
        importance = self.head_importance(own, self._keep(baseline, entries), entries, layers)[0]
        return corrected(budgets, importance, total, entries, protected)

    def _layer_total(
        self,
        layer_idx: int,
        baseline: Tensor,
        own: Tensor | None,
        earlier: Tensor,
        entries: Tensor,
        protected: Tensor,
    ) -> Tensor:
        """Entries [B] of layer `layer_idx`, from attention features [layer_idx + 1, B, H, 3] up to this layer."""
        layers, _, heads = baseline.shape
        later, keep, least = layers - 1 - layer_idx, self._keep(baseline, entries), heads * protected
        left = baseline.sum((0, 2)) - earlier.sum((0, 2)) - (later + 1) * least
        if later == 0:
            return left + least
        # A quarter of an entry for all layers together lets an empty one get something; rounding hides it.
        expected = baseline.sum(-1) - least + 1 / (4 * layers)
        weights = expected.log() + self.layer_budget(None, keep, entries)[..., 0].double()  # [L, B]
        weight = weights[layer_idx]
        if self.conditioner is not None:
            assert own is not None
            heads_mean = own.mean(2)  # [layer_idx + 1, B, 3]
            before = heads_mean[:layer_idx].mean(0) if layer_idx else torch.zeros_like(heads_mean[0])
            due = expected.sum(0) * (weights[layer_idx:].logsumexp(0) - weights.logsumexp(0)).exp()
            spared = ((left + 1) / (due + 1)).log().float()
            inputs = torch.cat([heads_mean[layer_idx], before, spared.unsqueeze(-1)], -1)
            weight = weight + self.conditioner(inputs.unsqueeze(1), keep, entries, layer_idx)[:, 0].double()
        share = left * torch.sigmoid(weight - weights[layer_idx + 1 :].logsumexp(0))
        room = heads * (entries - protected)
        return share.clamp(max=room).maximum(left - later * room) + least

    @staticmethod
    def _keep(baseline: Tensor, entries: Tensor) -> Tensor:
        """[B] fraction of a prompt's entries that the budget keeps."""
        return baseline.double().mean((0, 2)) / entries
