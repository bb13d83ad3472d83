"""KeyDiff scores."""

import torch.nn.functional as F
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer


class KeyDiff(Scorer):
    """Minus the cosine between a key and the mean direction of its head's keys (KeyDiff, arXiv 2504.15364).

    score_j = -cos(k_j, mean_t k_t / |k_t|): entries whose keys stand out are kept. The paper evicts block by block
    while the prompt is read; here, as in kvpress, the mean is over the whole prompt. Nothing is protected.
    """

    status = "numbers"

    def forward(self, obs: Observation) -> Tensor:
        keys = obs.keys.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0)
        anchor = F.normalize(keys, dim=-1).sum(2, keepdim=True) / obs.valid.sum(-1).clamp(min=1)[..., None, None]
        return -F.cosine_similarity(keys, anchor, dim=-1)
