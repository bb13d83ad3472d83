"""SnapKV scores."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.pool_apart import Pooling
from learnkv.ops.reduce_group import GroupReduce
from learnkv.ops.window_scores import WindowReduce, window_scores


class SnapKV(Scorer):
    """Attention that the last prompt queries give to an entry and its neighbours (SnapKV, arXiv 2404.14469).

    score_j = pool(mean_i A_ij) over the window's queries i, reduced over the query heads of a kv head. What is in print
    differs: the authors' code has window 64, kernel 5 and mean pooling as defaults, in its LongBench runs window 32,
    kernel 7 and maximum pooling, and one set of entries per query head; KVCache-Factory always has window 8;
    kvpress has window 64, kernel 5, mean pooling, and reduces query heads after pooling. All of them always keep the
    window, where here it is ranked by what its own queries give it.

    Args:
        window: number of last prompt queries.
        kernel_size: neighbouring entries that are pooled, odd.
        pooling: mean or maximum over the neighbours.
        window_reduce: mean or sum over the queries; the order within a head is the same.
        group_reduce: mean, maximum or sum over the query heads that share a kv head.
        group_first: reduce the query heads before the neighbours are pooled.
    """

    status = "numbers"

    def __init__(
        self,
        window: int = 32,
        kernel_size: int = 7,
        pooling: Pooling = "avg",
        window_reduce: WindowReduce = "mean",
        group_reduce: GroupReduce = "mean",
        group_first: bool = True,
    ) -> None:
        super().__init__()
        if window < 1:
            raise UserError(f"window={window}: SnapKV needs at least one query")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size={kernel_size}: expected an odd number, so that an entry is in the middle")
        self.window = window
        self.kernel_size = kernel_size
        self.pooling = pooling
        self.window_reduce = window_reduce
        self.group_reduce = group_reduce
        self.group_first = group_first

    def forward(self, obs: Observation) -> Tensor:
        return window_scores(
            obs.queries[:, :, -self.window :],
            obs.keys,
            query_positions=obs.query_positions[:, -self.window :],
            positions=obs.positions,
            valid=obs.valid,
            scaling=obs.scaling,
            terms=obs.terms,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            window_reduce=self.window_reduce,
            group_reduce=self.group_reduce,
            group_first=self.group_first,
        )
