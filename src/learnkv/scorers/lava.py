"""LAVa scores."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.pool_apart import Pooling
from learnkv.ops.window_scores import window_scores


class LAVa(Scorer):
    """Pooled attention of the last prompt queries times the largest value of the head (LAVa, arXiv 2509.09754).

    score_j = max over the query heads of a kv head of pool(mean_i A_ij), times max_t ||v_t||_1 over the entries before
    the window. The factor is the same for all entries of a head: it bounds what evicting one can change in the output,
    and so only matters where heads compete for a budget.

    Args:
        window: number of last prompt queries.
        kernel_size: neighbouring entries that are pooled, odd.
        pooling: mean or maximum over the neighbours.
    """

    status = "numbers"

    def __init__(self, window: int = 32, kernel_size: int = 7, pooling: Pooling = "max") -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        self.window = window
        self.kernel_size = kernel_size
        self.pooling = pooling

    def forward(self, obs: Observation) -> Tensor:
        attention = window_scores(
            obs.queries[:, :, -self.window :],
            obs.keys,
            query_positions=obs.query_positions[:, -self.window :],
            positions=obs.positions,
            valid=obs.valid,
            scaling=obs.scaling,
            terms=obs.terms,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            group_reduce="max",
            group_first=False,
        )
        norms = obs.values.float().abs().sum(-1).masked_fill(~obs.valid, 0.0)  # [B, H, S]
        past = obs.valid & ~obs.in_window(self.window)
        counted = past | ~past.any(-1, keepdim=True)  # a prompt within the window has no past
        return attention * norms.masked_fill(~counted, 0.0).amax(-1, keepdim=True)
