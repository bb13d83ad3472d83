"""A digest of a model's weights that does not depend on their number format, for a policy's manifest."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.inference import lora
from learnkv.inference.digest import plain_tensors
from learnkv.inference.models import describe_model


def weights_fingerprint(model: PreTrainedModel) -> str | None:
    """32 hex digits over all weights, rounded to bfloat16 and without adapters of policies; None where some are absent.

    A model has the same fingerprint in float32 and in bfloat16, but another one after training.
    """
    weights = {name: weight for name, weight in model.named_parameters() if not lora.is_adapter_weight(name)}
    weights = dict(part for weight in weights.items() for part in plain_tensors(*weight))
    weights = {name.replace(".base_layer.", "."): weight for name, weight in weights.items()}
    if any(weight.is_meta for weight in weights.values()):
        return None
    names = sorted(weights)
    with ThreadPoolExecutor() as pool:
        parts = pool.map(_digest, (weights[name] for name in names))
        digest = hashlib.sha256("".join(f"{name}{part}" for name, part in zip(names, parts, strict=True)).encode())
    return digest.hexdigest()[:32]


def _digest(weight: Tensor) -> str:
    rounded = weight.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + rounded.numpy().tobytes()).hexdigest()


def describe_with_weights(model: PreTrainedModel) -> dict[str, Any]:
    """The model as the manifest of a policy that was trained for it has it: `describe_model` and its fingerprint."""
    return {**describe_model(model), "weights": weights_fingerprint(model)}


def other_weights(trained_for: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """One line where a model has other weights than the one that a policy was trained for; None: the same, or unknown.

    Args:
        trained_for, model: results of `describe_with_weights`.
    """
    before, now = trained_for.get("weights"), model.get("weights")
    if before is None or now is None or before == now:
        return None
    return (
        f"trained for the weights {before[:12]} of {trained_for.get('id')}, the model {model.get('id')} has "
        f"{now[:12]}, "
        "of one shape but another model (a base and its fine-tune?)"
    )
