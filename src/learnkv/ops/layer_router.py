"""Flux Attention's router: which layers attend to everything, from a prompt's pooled queries."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

DEPTH = {"f.0": True, "f.2": False, "r.0": True, "r.2": True, "r.4": False}
"""Linear layers in their order, and whether SiLU follows."""


def router_logits(weights: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    """Logits [B, 2] of sparse and full attention, or [B, 1] of full attention, from pooled queries [B, D].

    A feature extractor D - 8D - 2D and a classifier 2D - 4D - D - 2, with SiLU between the layers of each.
    """
    for name, activated in DEPTH.items():
        pooled = F.linear(pooled, weights[f"{name}.weight"], weights[f"{name}.bias"])
        pooled = F.silu(pooled) if activated else pooled
    return pooled


def full_margin(logits: Tensor) -> Tensor:
    """[B] by how much full attention is ahead; above 0 the router decides for it."""
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0]


def router_shapes(dim: int, classes: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights for head size `dim`."""
    sizes = [dim, 8 * dim, 2 * dim, 4 * dim, dim, classes]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, before, after in zip(DEPTH, sizes, sizes[1:], strict=False):
        shapes |= {f"{name}.weight": (after, before), f"{name}.bias": (after,)}
    return shapes
