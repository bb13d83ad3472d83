"""A ring of recent tokens beside what was kept of the prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError


@dataclass(frozen=True)
class PromptLength(Statistic):
    """Tokens of each row's prompt, with every entry, [B, H, S, 1]."""

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        heads, slots = chunk.keys.shape[1:3]
        if chunk.aligned or gathered is None:
            return chunk.length.view(-1, 1, 1, 1).float().expand(-1, heads, slots, 1).clone()
        before = gathered.shape[2]
        length = gathered.masked_fill(~chunk.valid[:, :, :before].unsqueeze(-1), 0.0).amax((1, 2, 3))
        new = length.view(-1, 1, 1, 1).expand(-1, heads, slots - before, 1)
        return torch.cat([gathered, new], 2)


class SnapStream(Scorer):
    """What was kept of the prompt, and the latest tokens in a ring: `decode` of SnapStream (arXiv 2511.03092).

    SnapKV compresses the prompt once. From then on its entries stay as they are, but for those of its last `ring`
    tokens, which begin a ring: every token that is read takes the place of the oldest in it. Source: description; the
    positions that tokens have in its ring are not stated, here they are their own. The ring is full from the first
    token on where the policy protects as many recent tokens of the prompt (`recent`).

    Of a prompt alone the scores are the order of its tokens, the first ones first, after the ring.

    Args:
        ring: latest tokens that are held.
    """

    status = "description"
    statistics = frozenset({PromptLength()})

    def __init__(self, ring: int = 8) -> None:
        super().__init__()
        if ring < 1:
            raise UserError(f"ring={ring}: expected at least one token")
        self.ring = ring

    def forward(self, obs: Observation) -> Tensor:
        length = obs.length.view(-1, 1, 1)
        prompt = obs.statistics[PromptLength()].squeeze(-1)
        recent = obs.positions >= length - self.ring
        static = obs.positions < prompt - self.ring
        place = obs.positions.float() / length.clamp(min=1)  # those that have left the ring: the oldest goes first
        return torch.where(recent, 3.0, torch.where(static, 2.0 - place, place - 1.0)).float()
