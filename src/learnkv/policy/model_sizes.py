"""Whether the learned components of a policy fit the model that read a prompt."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.component import Component
from learnkv.core.observation import Observation
from learnkv.errors import UserError

SIZES = {
    "num_layers": "layers",
    "num_heads": "heads",
    "num_groups": "groups",
    "head_dim": "head_dim",
    "hidden_size": "hidden_size",
}
"""Constructor arguments of learned components -> names of the model's sizes."""


def check_sizes(policy: nn.Module, trained_for: Mapping[str, Any] | None, sizes: Mapping[str, int], model: str) -> None:
    """Raise UserError where a component was made for other sizes than the model's.

    Args:
        trained_for: description of the model that the policy was trained for; None: unknown.
        sizes: of the model, by their names in its description; those that are not known may be absent.
        model: its name.
    """
    for component in policy.modules():
        if not isinstance(component, Component):
            continue
        made_for = {key: value for key, value in component.spec().items() if SIZES.get(key) in sizes and value}
        if other := [key for key, value in made_for.items() if value != sizes[SIZES[key]]]:
            made, has = (
                " ".join(f"{key}={value}" for key, value in part.items())
                for part in (
                    {key: made_for[key] for key in other},
                    {key: sizes[SIZES[key]] for key in other},
                )
            )
            origin = f" (model {trained_for.get('id')})" if trained_for else ""
            raise UserError(
                f"{component.name} was made for {made}{origin}, the model {model or 'without a name'} has {has}"
            )


def sizes_of(cache: CompressedCache, obs: Observation) -> dict[str, int]:
    """The sizes of the model that a prompt was read by, as far as one layer's observation shows them."""
    heads = obs.keys.shape[1]
    sizes = {"layers": len(cache.compressed_layers()), "heads": heads, "head_dim": obs.keys.shape[3]}
    if obs.queries.shape[2]:
        sizes["groups"] = obs.queries.shape[1] // heads
    return sizes if obs.hidden is None else {**sizes, "hidden_size": obs.hidden.shape[-1]}
