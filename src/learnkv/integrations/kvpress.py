"""A press that keeps in kvpress what a policy keeps in learnkv: `pip install learnkv[kvpress]`."""

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
from learnkv.inference.models import describe_model
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

try:
    from kvpress import BasePress
except ImportError as error:
    raise UserError(f"learnkv.integrations.kvpress: expected kvpress, pip install learnkv[kvpress] ({error})") from None


@dataclass
class LearnKVPress(BasePress):
    """A trained policy, or a heuristic of learnkv, as a press: kept is exactly what `Policy.compress` keeps.

    A prompt is read through learnkv, which plans once for all layers and heads when the last layer has read it. The
    caller's cache then gets the whole prompt, and each attention layer the indices of what counts as evicted: kvpress's
    `masked_key_indices`, whose keys its attention replaces by one that no query matches. So the full cache stays in
    memory and steps are not faster; learnkv itself frees what is evicted. kvpress looks for one such key for all tokens
    that are read at once, so that a long question may still see a little of what was evicted.

    Args:
        policy: a policy, or what `load_policy` takes: an exported folder, the name of a heuristic, an id of the hub.
        compression_ratio: fraction of the prompt's entries that counts as evicted, at least 0 and below 1.
        allow: module prefixes besides learnkv whose classes the policy's file may name.
    """

    policy: Policy | str | Path = "reference"
    compression_ratio: float = 0.0
    allow: tuple[str, ...] = ()

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it, every prompt that `model` reads into an empty cache is compressed."""
        if not 0 <= self.compression_ratio < 1:
            raise UserError(f"compression_ratio={self.compression_ratio:g}: expected at least 0 and less than 1")
        if is_attached(model):
            raise UserError(
                "the model computes through learnkv, which does not know kvpress's masks: detach(model) first"
            )
        if model.config._attn_implementation == "eager":
            raise UserError("attn_implementation=eager: kvpress does not mask keys there, expected sdpa")
        policy = self._fitting(model)
        reader = getattr(model.model, "language_model", model.model)
        reader.forward = functools.partial(self._forward, model, policy, reader, reader.forward)
        try:
            yield
        finally:
            del reader.forward

    def _fitting(self, model: PreTrainedModel) -> Policy:
        """The policy, refused where it does more than kvpress can follow."""
        policy = self.policy
        if not isinstance(policy, Policy):
            policy = load_policy(policy, self.allow, describe_model(model))
        more = {
            "pages": policy.pages,
            "every": policy.evict_interval,
            "rerotate": policy.rerotate,
            "an adapter": policy.adapter,
        }
        if found := [name for name, used in more.items() if used]:
            raise UserError(f"policy: has {', '.join(found)}; a press can only leave out entries of the prompt")
        return policy.to(model.device)

    def _forward(
        self,
        model: PreTrainedModel,
        policy: Policy,
        reader: Any,
        forward: Callable[..., Any],
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Of a prompt the reading, the plan and the masks; of anything else the model's own `forward`."""
        theirs: Cache | None = kwargs.get("past_key_values")
        read = functools.partial(forward, input_ids=input_ids, attention_mask=attention_mask)
        if isinstance(theirs, CompressedCache) or (theirs is not None and theirs.get_seq_length() > 0):
            return read(**kwargs)
        ours = CompressedCache(model.config, policy.capture_spec)
        if ours.has_sliding_layers:
            raise UserError(f"{model.config.model_type}: a press does not support layers with a sliding window")
        attach(model)
        try:
            with torch.no_grad():
                output = read(**{**kwargs, "past_key_values": ours, "use_cache": True})
                for prompt_pass in policy.capture_spec.extra_passes:
                    if input_ids is None:
                        raise UserError("policy: reads the prompt again, expected input_ids")
                    there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                    run_extra_pass(model, ours, prompt_pass, input_ids, there.bool())
                small = policy.compress(ours.fork(), keep=round(1 - self.compression_ratio, 12))
        finally:
            detach(model)
        for layer, module in zip(ours.compressed_layers(), reader.layers, strict=True):
            evicted = layer.prompt.entry_positions() >= 0
            for row, heads in enumerate(evicted):
                padding = heads.shape[-1] - int(heads[0].sum())
                for head, one in enumerate(heads):
                    one[small.layers[module.self_attn.layer_idx].kept_positions(row, head) + padding] = False
            module.self_attn.masked_key_indices = evicted.nonzero(as_tuple=True) if bool(evicted.any()) else None
        output.past_key_values = DynamicCache() if theirs is None else theirs
        del small
        for index in range(len(ours.layers)):  # one layer after the other, so that little is held twice
            prompt = ours.layers.pop(0).prompt
            output.past_key_values.update(prompt.keys, prompt.values, index)
        return output
