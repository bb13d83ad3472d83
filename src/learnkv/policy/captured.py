"""Whether a prompt was read such that a policy can plan for it."""

from typing import Any

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.adapter import Adapter
from learnkv.core.observation import CaptureSpec, Observation
from learnkv.errors import UserError


def check_captured(spec: CaptureSpec, scorer: str, obs: Observation) -> None:
    """Raise UserError where the prompt was read without what a policy's scorers read."""
    captured, slots = obs.queries.shape[2], obs.keys.shape[2]
    if captured < min(spec.window, slots):
        raise UserError(
            f"window={captured}: the policy reads the last {spec.window} queries of a prompt; "
            f"prefill it with window={spec.window}"
        )
    if spec.hidden and obs.hidden is None:
        raise UserError("the policy reads hidden states: hand it to prefill, among policies= or as policy=")
    functions = {"projection": obs.project, "rotation": obs.rotation}
    if any(functions[name] is None for name in spec.functions):
        raise UserError(
            f"the policy's {scorer} applies functions of the layers that a stored prompt does not have: compress it "
            "before it is saved"
        )
    if spec.token_ids and obs.token_ids is None:
        raise UserError("the policy reads the prompt's token ids: hand it to prefill, among policies= or as policy=")
    if not spec.statistics | spec.extra_passes <= obs.statistics.keys():
        raise UserError(
            f"the policy's {scorer} reads more of a prompt than keys, values and the "
            "last queries, or its weights have changed since: hand it to prefill, among policies= or as policy="
        )


def refuse_inference_tensors(cache: CompressedCache) -> None:
    """Raise UserError where gradients are recorded and the prompt was read in `torch.inference_mode`."""
    if torch.is_grad_enabled() and any(tensor.is_inference() for tensor in cache.tensors()):
        raise UserError(
            "the prompt was read within torch.inference_mode, whose tensors cannot be used in training: read it with "
            "torch.no_grad, as learnkv.prefill does by itself"
        )


def record_compression(cache: CompressedCache, spec: dict[str, Any], adapter: Adapter | None, **spent: object) -> None:
    """Record by which policy and budget a cache is compressed; its adapter acts on the tokens to come."""
    cache.adapter = adapter
    given = {name: value for name, value in spent.items() if value is not None}
    cache.compression = {"policy": spec, **given}
