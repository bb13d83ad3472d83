"""R-KV scores."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.pool_apart import pool_apart
from learnkv.ops.softmax_terms import softmax

_ROWS = 256


class RKV(Scorer):
    """Attention of the last queries, less how much a key repeats others (R-KV, arXiv 2505.24133).

    score_j = mix_lambda * pool_max(attention_j) - (1 - mix_lambda) * softmax_j(mean_i sim_ij), sim the cosines between
    the keys of a head. The largest logit of a kv head's query heads goes into a softmax over the entries before the
    window, averaged over the window's queries; of learned attention sinks the largest, too. Entries are not redundant
    to themselves, nor to one key that they resemble (cosine above `threshold`), so that of several copies one stays:
    the last (`keep_copy`), or, as the code does under the name `first`, the prompt's first entry, whatever it
    resembles. The paper weighs attention with 0.1 and compresses what was generated; the authors' code has 0.07, the
    default here.

    Args:
        window: number of last queries.
        kernel_size: neighbouring entries whose attention is pooled, odd.
        mix_lambda: weight of the attention; the rest is redundancy's.
        threshold: cosine above which a key counts as a copy.
        keep_copy: which copy of a key does not count as redundant.
    """

    status = "numbers"

    def __init__(
        self,
        window: int = 8,
        kernel_size: int = 7,
        mix_lambda: float = 0.07,
        threshold: float = 0.5,
        keep_copy: Literal["last", "first"] = "last",
    ) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        if not 0 <= mix_lambda <= 1 or threshold < 0:
            raise UserError(
                f"mix_lambda={mix_lambda} threshold={threshold}: expected 0 <= mix_lambda <= 1 and threshold >= 0"
            )
        self.window = window
        self.kernel_size = kernel_size
        self.mix_lambda = mix_lambda
        self.threshold = threshold
        self.keep_copy = keep_copy

    def forward(self, obs: Observation) -> Tensor:
        return self.mix_lambda * self._attention(obs) - (1 - self.mix_lambda) * self._redundancy(obs)

    def _attention(self, obs: Observation) -> Tensor:
        """[B, H, S]; the window's own entries have their part in a softmax over all entries up to a query."""
        grouped = obs.queries[:, :, -self.window :].float().unflatten(1, (obs.keys.shape[1], -1))
        logits = torch.einsum("bhgwd,bhsd->bhgws", grouped, obs.keys.float()).amax(2) * obs.scaling
        logits, sinks = obs.terms.capped(logits), obs.terms.of_heads(obs.keys.shape[1])
        if sinks is not None:
            sinks = sinks.amax(1, keepdim=True)  # [H, 1, 1]
        queries = obs.query_positions[:, -self.window :]  # [B, W]
        sees = (obs.positions.unsqueeze(2) <= queries[:, None, :, None]) & obs.valid.unsqueeze(2)
        sees = sees & (queries >= 0)[:, None, :, None]
        inside = obs.in_window(self.window)
        weights = torch.where(
            inside.unsqueeze(2), _softmax(logits, sees, sinks), _softmax(logits, sees & ~inside.unsqueeze(2), sinks)
        )
        attention = weights.sum(2) / sees.sum(2).clamp(min=1)
        return pool_apart(attention, inside, obs.valid, self.kernel_size, "max")

    def _redundancy(self, obs: Observation) -> Tensor:
        """Softmax over a head's entries of their mean cosine with the others, [B, H, S]."""
        keys = obs.keys.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0)
        keys = keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)
        slot = torch.arange(keys.shape[2], device=keys.device)
        first = obs.valid.int().argmax(-1, keepdim=True).unsqueeze(-1)  # [B, H, 1, 1]
        similar = torch.zeros_like(keys[..., 0])
        for begin in range(0, keys.shape[2], _ROWS):  # S x S at once would not fit for long prompts
            cosine = keys[:, :, begin : begin + _ROWS] @ keys.transpose(2, 3)
            cosine = cosine.masked_fill(slot[begin : begin + _ROWS].unsqueeze(-1) == slot, 0.0)
            spared = first.expand(*cosine.shape[:3], 1)
            if self.keep_copy == "last":
                spared = torch.where(cosine > self.threshold, slot, first).amax(-1, keepdim=True)
            similar = similar + cosine.scatter(-1, spared, 0.0).sum(2)
        mean = similar / obs.valid.sum(-1, keepdim=True).clamp(min=1)
        return _softmax(mean, obs.valid)


def _softmax(logits: Tensor, among: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Over those `among` only, 0 elsewhere."""
    return softmax(logits.masked_fill(~among, -torch.inf), sinks).masked_fill(~among, 0.0)
