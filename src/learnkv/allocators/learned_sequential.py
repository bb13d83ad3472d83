"""Learned budgets that are decided while the prompt is read: a layer's depends on it and on the layers before it."""

import torch
from torch import Tensor

from learnkv.allocators.conditioning import Conditioner, attention_features
from learnkv.allocators.learned import HeadImportance, LayerBudget, corrected
from learnkv.core.allocator import Allocator, SequentialAllocator, entries_of, protected_of
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_to_budget


class LearnedSequentialAllocator(SequentialAllocator):
    """A heuristic's budgets, moved by what was learned and by what each layer is found to attend to, layer by layer.

    Stick-breaking: of what earlier layers left, a layer takes its weight over its own and the expected weights of the
    layers to come. Expected weights are the heuristic's budgets times learned factors; when a layer has been read, its
    attention, that of the layers before it and how much these left, against what was expected, correct its own. Heads
    share what their layer gets by learned head importance, from the heuristic's split of it on. A layer takes no more
    than it can hold, and no less than what later ones cannot, so that the budget is spent exactly, with a gradient.
    The construction is this project's own.

    Args:
        base: the heuristic to start from: static, or `LayerByLayer` for heads that follow their scores.
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
        """[B, H, 3 + F]: attention features, then the F features of the heuristic; None where neither wants any."""
        theirs = self.base.features(obs)
        if self.conditioner is None:
            return theirs
        own = attention_features(obs, self._own_window)
        return own if theirs is None else torch.cat([own, theirs], -1)

    def prior(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        have = self.head_importance.logits.shape
        if have[1:] != (layers, scores.shape[1]):
            raise UserError(f"num_layers={have[1]} num_heads={have[2]}: the model has {layers} and {scores.shape[1]}")
        return self.base.prior(scores, layers, budget)

    def layer(self, at: int, prior: Tensor, scores: Tensor, features: Tensor | None, before: Tensor) -> Tensor:
        own, theirs = None, features
        if self.conditioner is not None:
            assert features is not None
            own, theirs = features[..., : Conditioner.FEATURES], features[..., Conditioner.FEATURES :]
        entries, protected = entries_of(scores.unsqueeze(0)), protected_of(scores.unsqueeze(0))
        asked = self._asked(at, prior, own, before, entries, protected)

        heads = self.base.layer(at, prior, scores, theirs, before)
        start = round_to_budget(heads.unsqueeze(0), entries, prior[at].sum(-1), protected)[0]
        here = None if own is None else own[at:]
        importance = self.head_importance(here, self._keep(prior, entries), entries, slice(at, at + 1))[0]
        return corrected(start, importance, asked, entries, protected)

    def _asked(
        self, at: int, prior: Tensor, own: Tensor | None, before: Tensor, entries: Tensor, protected: Tensor
    ) -> Tensor:
        """Entries [B] of layer `at`, from attention features [at + 1, B, H, 3] up to this layer."""
        layers, _, heads = prior.shape
        later, keep, in_any_case = layers - 1 - at, self._keep(prior, entries), heads * protected
        left = prior.sum((0, 2)) - before.sum((0, 2)) - (later + 1) * in_any_case
        if later == 0:
            return left + in_any_case
        # A quarter of an entry for all layers together lets one that has nothing get something; rounding hides it.
        expected = prior.sum(-1) - in_any_case + 1 / (4 * layers)
        weights = expected.log() + self.layer_budget(None, keep, entries)[..., 0].double()  # [L, B]
        mine = weights[at]
        if self.conditioner is not None:
            assert own is not None
            heads_mean = own.mean(2)  # [at + 1, B, 3]
            earlier = heads_mean[:at].mean(0) if at else torch.zeros_like(heads_mean[0])
            due = expected.sum(0) * (weights[at:].logsumexp(0) - weights.logsumexp(0)).exp()
            spared = ((left + 1) / (due + 1)).log().float()
            inputs = torch.cat([heads_mean[at], earlier, spared.unsqueeze(-1)], -1)
            mine = mine + self.conditioner(inputs.unsqueeze(1), keep, entries, at)[:, 0].double()
        share = left * torch.sigmoid(mine - weights[at + 1 :].logsumexp(0))
        room = heads * (entries - protected)
        return share.clamp(max=room).maximum(left - later * room) + in_any_case

    @staticmethod
    def _keep(prior: Tensor, entries: Tensor) -> Tensor:
        """[B] fraction of a prompt's entries that the budget keeps."""
        return prior.double().mean((0, 2)) / entries
