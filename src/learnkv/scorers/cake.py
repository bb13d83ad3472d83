"""CAKE scores."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.pool_apart import Pooling, pool_apart


class CAKE(Scorer):
    """Mean and variance of the attention that the last prompt queries give to an entry (CAKE, arXiv 2503.12491).

    score_j = mean over query heads of pool(mean_i A_ij + gamma * var_i A_ij), the variance over the queries i that see
    the entry, divided by their number less one: entries that only some queries need are kept too.

    Args:
        window: number of last prompt queries.
        kernel_size: neighbouring entries that are pooled, odd.
        pooling: mean or maximum over the neighbours.
        gamma: weight of the variance.
    """

    status = "numbers"

    def __init__(self, window: int = 32, kernel_size: int = 5, pooling: Pooling = "avg", gamma: float = 200.0) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        self.window = window
        self.kernel_size = kernel_size
        self.pooling = pooling
        self.gamma = gamma

    def forward(self, obs: Observation) -> Tensor:
        weights, sees = obs.window_attention(self.window)  # [B, H, G, W, S], [B, H, W, S]
        sees = sees.unsqueeze(2)
        queries = sees.sum(3)  # [B, H, 1, S]
        mean = weights.sum(3) / queries.clamp(min=1)
        apart = (weights - mean.unsqueeze(3)).masked_fill(~sees, 0.0).square().sum(3)
        indicator = mean + self.gamma * apart / (queries - 1).clamp(min=1)  # [B, H, G, S]
        inside, valid = obs.in_window(self.window).unsqueeze(2), obs.valid.unsqueeze(2)
        return pool_apart(indicator, inside, valid, self.kernel_size, self.pooling).mean(2)
