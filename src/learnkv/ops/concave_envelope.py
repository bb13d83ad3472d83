"""The least concave function above points: what is gained per byte, level after level."""

import torch
from torch import Tensor


def envelope_slopes(quality: Tensor, cost: Tensor) -> Tensor:
    """Slopes [..., M] of the least concave function above (0, 0) and the points (cost, quality), from point to point.

    Slopes never increase. A point below the function lies between two with the same slope. The gradient reaches the
    ends of every straight piece only.

    Args:
        quality: [..., M].
        cost: [..., M], ascending and positive.
    """
    origin = quality.new_zeros(quality.shape[:-1]).unsqueeze(-1)
    quality, cost = torch.cat([origin, quality], -1), torch.cat([origin, cost.to(quality).expand_as(quality)], -1)
    count = quality.shape[-1] - 1
    slopes = []
    for point in range(1, count + 1):  # min over starts before it of the max over ends from it on
        starts = [
            torch.stack([_slope(quality, cost, start, end) for end in range(point, count + 1)]).amax(0)
            for start in range(point)
        ]
        slopes.append(torch.stack(starts).amin(0))
    return torch.stack(slopes, -1)


def _slope(quality: Tensor, cost: Tensor, start: int, end: int) -> Tensor:
    return (quality[..., end] - quality[..., start]) / (cost[..., end] - cost[..., start])
