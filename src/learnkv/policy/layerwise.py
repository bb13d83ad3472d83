"""Eviction of every layer as soon as it has read the prompt, before the next layer reads it."""

import functools

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.allocator import Allocator
from learnkv.core.observation import Observation
from learnkv.ops.device import upload
from learnkv.ops.round_to_budget import round_layer
from learnkv.policy.online import schedule_eviction
from learnkv.policy.policy import Policy


def compress_when_read(policy: Policy, cache: CompressedCache, keep: float | None, budget: float | None) -> None:
    """Let every layer evict once it has read the end of the prompt; what is kept is what `compress` would keep."""
    assert policy.reads_once
    assert policy.scorer is not None
    scorer, layers = policy.scorer, cache.compressed_layers()
    split: list[_Split] = []

    def evict(at: int) -> None:
        total, protected = policy.spending(cache, keep, budget)
        obs = policy.obs(cache, at, total)
        scores = policy.judge(scorer, obs, protected).scores
        if at == 0:
            cache.schedule, cache.adapter = schedule_eviction(policy, cache, keep, budget), policy.adapter
            split.append(_Split(policy.allocator, len(layers), scores, cache.lengths, total, protected))
            cache.budgets = split[0].budgets
        mine, of_layer = split[0].layer(at, obs, scores)
        mine = mine.to(scores.device)
        scores = policy.refine(scorer, obs, scores, mine)
        cache.evict(scores.unsqueeze(0), mine.unsqueeze(0), of_layer, at, policy.rerotate)

    for at, layer in enumerate(layers):
        layer.when_read = functools.partial(evict, at)


class _Split:
    """What the layers of one prompt get, one after the other.

    A static allocator has decided before anything is read, and one look at its split tells the host what each layer's
    pool will hold. A causal one decides when a layer has been read, and the host looks at each.

    Args:
        allocator: static or causal.
        layers: L.
        scores: [B, H, S] of the first layer.
        entries, total, protected: of each row, as `fit` takes them.
    """

    def __init__(
        self,
        allocator: Allocator,
        layers: int,
        scores: Tensor,
        entries: list[int],
        total: list[int],
        protected: list[int],
    ) -> None:
        self.allocator, self.device = allocator, scores.device
        self.entries, self.left, self.protected = (upload(one, self.device) for one in (entries, total, protected))
        per_head = self.left.to(torch.float64) / (layers * scores.shape[1])
        self.prior = allocator.prior(scores, layers, per_head)
        self.known = self.prior.sum((1, 2)).tolist() if allocator.static else None
        self.budgets = self.prior.clone()
        """[L, B, H] int64, exact for the layers that have been read."""
        self.wanted = self.prior.new_empty(0, *self.prior.shape[1:], dtype=torch.float64)
        self.features: list[Tensor] = []

    def layer(self, at: int, obs: Observation, scores: Tensor) -> tuple[Tensor, int]:
        """Budgets [B, H] of layer `at`, from what was seen of it and its scores [B, H, S], and their sum."""
        if self.known is not None:
            return self.budgets[at], self.known[at]
        new = self.allocator.features(obs)
        if new is not None:
            self.features.append(new.to(self.device))
        known = torch.stack(self.features) if self.features else None
        wish = self.allocator.layer(at, self.prior, scores.to(self.device), known, self.wanted)
        later = len(self.prior) - 1 - at
        before = self.wanted.sum((0, 2))
        self.budgets[at] = round_layer(wish, before, self.left, later, self.entries, self.protected)
        self.wanted = torch.cat([self.wanted, wish.double().unsqueeze(0)])
        self.left = self.left - self.budgets[at].sum(-1)
        return self.budgets[at], sum(self.budgets[at].sum(-1).tolist())
