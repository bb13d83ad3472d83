"""Query heads that share a kv head, made one."""

from typing import Literal

from torch import Tensor

GroupReduce = Literal["mean", "max", "sum"]


def reduce_group(per_query_head: Tensor, how: GroupReduce) -> Tensor:
    """[B, H, G, …] to [B, H, …]."""
    if how == "max":
        return per_query_head.amax(2)
    return per_query_head.mean(2) if how == "mean" else per_query_head.sum(2)
