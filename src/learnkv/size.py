"""How large a policy is beside the model that it serves."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from learnkv.policy import Policy


def parameter_share(policy: Policy, model: nn.Module) -> float:
    """Parameters of the policy over those of the model; tied weights count once. Both may be on the meta device."""
    return sum(one.numel() for one in policy.parameters()) / sum(one.numel() for one in model.parameters())


def sized(spec: Any, shapes: Mapping[str, int]) -> Any:
    """A policy's arguments with the model's sizes wherever a learned part has 0 for them.

    Args:
        spec: `Policy.spec()`, or a part of it.
        shapes: layers and kv heads that are compressed, head dimension and hidden size (`describe_model`).
    """
    if not isinstance(spec, dict):
        return spec
    names = {"num_layers": "layers", "num_heads": "heads", "head_dim": "head_dim", "hidden_size": "hidden_size"}
    return {
        key: shapes[names[key]] if key in names and value == 0 else sized(value, shapes) for key, value in spec.items()
    }
