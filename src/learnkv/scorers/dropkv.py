"""What evicting one entry changes in the attention output."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.pool_apart import pool_apart


class DropKV(Scorer):
    """What the outputs of the last queries change by where one entry alone is evicted (DropKV).

    score_j = pool(mean over query heads of sum_i (p_ij / (1 - p_ij))^2 |v_j - o_i|^2), with p the attention of query i
    and o its output: without entry j, a softmax over the others moves o by p / (1 - p) (o - v_j). Source: the authors'
    press for kvpress (pull requests 284 and 285) and https://openreview.net/forum?id=MqfNzH3TVH. It keeps the window in
    any case; here it is ranked by its own queries. There the distances are expanded, where a token that gets nearly all
    attention loses its digits; here they are computed as they stand.

    Args:
        window: number of last queries.
        kernel_size: neighbouring entries whose scores are averaged, odd; 1: none.
        epsilon: added to 1 - p.
    """

    status = "numbers"

    def __init__(self, window: int = 32, kernel_size: int = 7, epsilon: float = 1e-6) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0 or epsilon <= 0:
            raise UserError(
                f"window={window} kernel_size={kernel_size} epsilon={epsilon}: expected window >= 1, an odd "
                "kernel_size and epsilon > 0"
            )
        self.window, self.kernel_size, self.epsilon = window, kernel_size, epsilon

    def forward(self, obs: Observation) -> Tensor:
        weights, _ = obs.window_attention(self.window)  # [B, H, G, W, S]
        values = obs.values.to(weights.dtype).masked_fill(~obs.valid.unsqueeze(-1), 0.0)
        scores = values.new_zeros(obs.valid.shape)
        for member in weights.unbind(2):  # distances of all query heads at once would be as large again
            apart = torch.cdist(member @ values, values, compute_mode="donot_use_mm_for_euclid_dist")
            scores += ((member / (1 - member + self.epsilon)) * apart).square().sum(2)
        scores = scores / weights.shape[2]
        nowhere = torch.zeros_like(obs.valid)
        return pool_apart(scores.float(), nowhere, obs.valid, self.kernel_size, "avg")
