"""How large a policy is beside the model that it serves."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from learnkv.policy.policy import Policy

_NAMES = {
    "num_layers": "layers",
    "num_heads": "heads",
    "num_groups": "groups",
    "head_dim": "head_dim",
    "hidden_size": "hidden_size",
}


def parameter_share(policy: Policy, model: nn.Module) -> float:
    """Parameters of the policy over those of the model; tied weights count once. Both may be on the meta device."""
    return sum(one.numel() for one in policy.parameters()) / sum(one.numel() for one in model.parameters())


def sized(spec: Any, shapes: Mapping[str, int]) -> Any:
    """A policy's arguments with the model's sizes wherever a learned part has 0 for them.

    Args:
        spec: `Policy.spec()`, or a part of it.
        shapes: layers and kv heads that are compressed, query heads per kv head and other sizes (`describe_model`).
    """
    if not isinstance(spec, dict):
        return spec
    return {
        key: shapes[_NAMES[key]] if key in _NAMES and value == 0 else sized(value, shapes)
        for key, value in spec.items()
    }
