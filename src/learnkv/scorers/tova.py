"""TOVA scores."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer


class TOVA(Scorer):
    """Attention of the last query, averaged over all query heads of the layer (TOVA, arXiv 2401.06104).

    score_j = mean over heads of softmax(q_last K / sqrt(D))_j: every kv head of a layer keeps the same entries. The
    original protects nothing, not even the newest entry, and evicts one entry per generated token; kvpress always keeps
    the newest, which here is up to the policy's `recent`.
    """

    status = "numbers"
    window = 1

    def forward(self, obs: Observation) -> Tensor:
        weights, _ = obs.window_attention(1)  # [B, H, G, 1, S]
        return weights.mean((1, 2, 3)).unsqueeze(1).expand(obs.valid.shape)
