"""Policies of learnkv as presses of kvpress: `pip install learnkv[kvpress]`."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.inference.attention import attach, detach, is_attached
from learnkv.inference.extra_passes import run_extra_pass
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

try:
    from kvpress import BasePress
except ImportError as error:
    raise UserError(f"learnkv.integrations.kvpress: expected kvpress, pip install learnkv[kvpress] ({error})") from None


@dataclass
class LearnKVPress(BasePress):
    """A policy of learnkv as a press: the kept entries are those of `Policy.compress`.

    The prompt is prefilled through learnkv, then evicted entries are masked by kvpress's `masked_key_indices`: its
    attention replaces their keys by one that no query matches. The full cache stays in memory and decoding is not
    faster; learnkv itself frees evicted entries. kvpress uses one such key for all tokens that are read at once, so
    that a long question may still attend a little to evicted entries.

    Args:
        policy: a policy, or what `load_policy` takes: an exported folder, the name of a heuristic, an id of the hub.
        compression_ratio: fraction of the prompt's entries to evict, at least 0 and below 1.
        allow: module prefixes besides learnkv whose classes the policy's file may name.
    """

    policy: Policy | str | Path = "reference"
    compression_ratio: float = 0.0
    allow: tuple[str, ...] = ()

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Compress every prompt that `model` reads into an empty cache within this context."""
        if not 0 <= self.compression_ratio < 1:
            raise UserError(f"compression_ratio={self.compression_ratio:g}: expected at least 0 and less than 1")
        if is_attached(model):
            raise UserError(
                "the model is attached to learnkv, which does not apply kvpress's masks: detach(model) first"
            )
        if model.config._attn_implementation == "eager":
            raise UserError("attn_implementation=eager: kvpress does not mask keys there, expected sdpa")
        policy = self._loaded(model)
        decoder = getattr(model.model, "language_model", model.model)
        decoder.forward = functools.partial(self._forward, model, policy, decoder, decoder.forward)
        try:
            yield
        finally:
            del decoder.forward

    def _loaded(self, model: PreTrainedModel) -> Policy:
        """The policy on the model's device; UserError for options that a press does not have."""
        policy = self.policy
        if not isinstance(policy, Policy):
            policy = load_policy(policy, self.allow, model)
        options = {
            "pages": policy.pages,
            "evict_interval": policy.evict_interval,
            "rerotate": policy.rerotate,
            "precision": policy.precision,
            "residual": policy.residual,
            "an adapter": policy.adapter,
        }
        if unsupported := [name for name, value in options.items() if value]:
            raise UserError(f"policy: has {', '.join(unsupported)}; a press can only evict entries of the prompt")
        return policy.to(model.device)

    def _forward(
        self,
        model: PreTrainedModel,
        policy: Policy,
        decoder: Any,
        forward: Callable[..., Any],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder's `forward`; a prompt is also compressed and its evicted entries are masked."""
        cache: Cache | None = kwargs.get("past_key_values")
        read = functools.partial(forward, input_ids=input_ids, attention_mask=attention_mask)
        if isinstance(cache, CompressedCache) or (cache is not None and cache.get_seq_length() > 0):
            return read(**kwargs)
        whole = CompressedCache(model.config, policy.capture_spec)
        if whole.is_hybrid:
            kind = "a sliding window" if whole.sliding else "states"
            raise UserError(f"{model.config.model_type}: a press does not support layers with {kind}")
        attach(model)
        try:
            with torch.no_grad():
                output = read(**{**kwargs, "past_key_values": whole, "use_cache": True})
                _run_extra_passes(model, policy, whole, input_ids, attention_mask)
                kept = policy.compress(whole.fork(), keep=round(1 - self.compression_ratio, 12))
        finally:
            detach(model)
        _mask_evicted(decoder, whole, kept)
        output.past_key_values = DynamicCache() if cache is None else cache
        del kept
        for index in range(len(whole.layers)):  # layer by layer, so that no second copy of the cache is made
            prompt = whole.layers.pop(0).prompt
            output.past_key_values.update(prompt.keys, prompt.values, index)
        return output


def _run_extra_passes(
    model: PreTrainedModel, policy: Policy, cache: CompressedCache, ids: Tensor | None, mask: Tensor | None
) -> None:
    """The passes over the prompt that the policy's scorers need."""
    for prompt_pass in policy.capture_spec.extra_passes:
        if ids is None:
            raise UserError("policy: reads the prompt again, expected input_ids")
        valid = torch.ones_like(ids) if mask is None else mask
        run_extra_pass(model, cache, prompt_pass, ids, valid.bool())


def _mask_evicted(decoder: Any, whole: CompressedCache, kept: CompressedCache) -> None:
    """Set kvpress's `masked_key_indices` of every attention module to the entries that `kept` lacks."""
    for layer, module in zip(whole.compressed_layers(), decoder.layers, strict=True):
        evicted = layer.prompt.entry_positions() >= 0  # [B, H, S]
        for row, heads in enumerate(evicted):
            padding = heads.shape[-1] - int(heads[0].sum())
            for head, entries in enumerate(heads):
                entries[kept.layers[module.self_attn.layer_idx].kept_positions(row, head) + padding] = False
        module.self_attn.masked_key_indices = evicted.nonzero(as_tuple=True) if bool(evicted.any()) else None
