"""Layerwise eviction: every layer evicts as soon as it has read the prompt, before the next layer reads it."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.allocator import Allocator
from learnkv.core.finite import Invalid, check_shape, without_nan
from learnkv.core.observation import Observation
from learnkv.ops.device import upload
from learnkv.ops.round_to_budget import round_layer
from learnkv.policy.byte_budget import ByteCount, uniform_levels
from learnkv.policy.captured import record_compression
from learnkv.policy.model_sizes import sizes_of
from learnkv.policy.planner import with_keep
from learnkv.policy.policy import Policy


def compress_when_read(
    policy: Policy,
    cache: CompressedCache,
    keep: float | None,
    budget: float | None,
    byte_count: ByteCount | None = None,
) -> None:
    """Let every layer evict once it has read the end of the prompt; the kept entries are those of `compress`."""
    assert policy.reads_once
    layers = cache.compressed_layers()
    splits: list[_Split] = []

    def evict(layer_idx: int) -> None:
        spend = policy.byte_budget(cache, byte_count)
        planner = policy.planner.with_bytes(spend)
        totals, protected = policy.totals(cache, keep, budget, spend)
        obs = with_keep(layers[layer_idx].observation(), cache.lengths, totals, len(layers))
        policy.check_sizes(sizes_of(cache, obs), cache.model_name)
        invalid: list[Invalid] = []
        scores = planner.score(obs, protected).scores
        scores = planner.without_nan(scores[None], invalid, layer_idx)[0]
        if layer_idx == 0:
            record_compression(cache, policy.spec(), policy.adapter, keep=keep, budget=budget, bytes=byte_count)
            policy.schedule(cache, keep, budget, byte_count)
            splits.append(_Split(policy.allocator, len(layers), scores, cache.lengths, totals, protected.counts))
            cache.budgets = splits[0].budgets
        budgets, total = splits[0].layer(layer_idx, obs, scores)
        budgets = budgets.to(scores.device)
        scores = planner.refine(obs, scores, budgets)
        scores = planner.without_nan(scores[None], invalid, layer_idx)[0]
        cache.invalid += (*invalid, *splits[0].invalid)
        splits[0].invalid.clear()
        budgets, levels = budgets.unsqueeze(0), None
        if planner.precision is not None:
            levels = uniform_levels(planner.precision, budgets, budgets.double())
        cache.evict(scores.unsqueeze(0), budgets, total, layer_idx, policy.rerotate, levels)

    for layer_idx, layer in enumerate(layers):
        layer.when_read = functools.partial(evict, layer_idx)


class _Split:
    """Budgets of the layers of one prompt, one after the other.

    A static allocator decides before anything is read, and one device-to-host copy has the size of every layer's pool.
    A sequential one decides when a layer has been read, with a copy for each.

    Args:
        allocator: static or sequential.
        layers: L.
        scores: [B, H, S] of the first layer.
        entries, totals, protected: of each row, as of `round_to_budget`.
    """

    def __init__(
        self,
        allocator: Allocator,
        layers: int,
        scores: Tensor,
        entries: Sequence[int],
        totals: Sequence[int],
        protected: Sequence[int],
    ) -> None:
        self.allocator, self.device = allocator, scores.device
        self.entries, self.left, self.protected = (upload(part, self.device) for part in (entries, totals, protected))
        per_head = self.left.to(torch.float64) / (layers * scores.shape[1])
        self.baseline = allocator.baseline_budgets(scores, layers, per_head)
        self.sizes = self.baseline.sum((1, 2)).tolist() if allocator.static else None
        self.budgets = self.baseline.clone()
        """[L, B, H] int64, exact for the layers that have been read."""
        self.wanted = self.baseline.new_empty(0, *self.baseline.shape[1:], dtype=torch.float64)
        self.features: list[Tensor] = []
        self.invalid: list[Invalid] = []
        """Budgets that are not numbers, on a GPU."""

    def layer(self, layer_idx: int, obs: Observation, scores: Tensor) -> tuple[Tensor, int]:
        """Budgets [B, H] of layer `layer_idx`, from its observation and scores [B, H, S], and their sum."""
        if self.sizes is not None:
            return self.budgets[layer_idx], self.sizes[layer_idx]
        new = self.allocator.features(obs)
        if new is not None:
            self.features.append(new.to(self.device))
        features = torch.stack(self.features) if self.features else None
        wanted = self.allocator.layer(layer_idx, self.baseline, scores.to(self.device), features, self.wanted)
        name = f"{self.allocator.name}: budgets"
        check_shape(wanted, scores.shape[:2], name, "[B, H]")
        wanted = without_nan(wanted.unsqueeze(0), name, self.invalid, layer_idx)[0]
        later = len(self.baseline) - 1 - layer_idx
        earlier = self.wanted.sum((0, 2))
        self.budgets[layer_idx] = round_layer(wanted, earlier, self.left, later, self.entries, self.protected)
        self.wanted = torch.cat([self.wanted, wanted.double().unsqueeze(0)])
        self.left = self.left - self.budgets[layer_idx].sum(-1)
        return self.budgets[layer_idx], sum(self.budgets[layer_idx].sum(-1).tolist())
