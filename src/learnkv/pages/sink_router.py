"""SinkRouter: heads whose query looks at the first token read nothing."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.entry_selector import EntrySelector, Lookup, State
from learnkv.core.observation import Observation
from learnkv.errors import UserError


class SinkRouter(EntrySelector):
    """A kv head reads everything or nothing, by the cosine of its queries to the first key (arXiv 2604.16883).

    Where the cosine, over the query heads of the group, is above a threshold, the head's output is 0: such heads would
    have attended to the attention sink. Only a description is public. Its threshold is a cubic polynomial of the number
    of tokens, fitted such that some 60 % of the reads are skipped; its coefficients are not published. Here the default
    threshold of a layer is the quantile of the cosines of the prompt's last queries that reads the policy's fraction.

    Args:
        dense_layers: number of first layers that read everything.
        group_reduce: over the query heads of a kv head; not published.
        window: last queries of the prompt that the threshold comes from.
        cubic: coefficients c of a threshold, the sum of c_i (tokens / 1000)^i; the budget is not used then.
    """

    status = "description"
    aligned = True

    def __init__(
        self,
        dense_layers: int = 2,
        group_reduce: Literal["mean", "min"] = "mean",
        window: int = 64,
        cubic: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if window < 1 or dense_layers < 0:
            raise UserError(f"window={window} dense_layers={dense_layers}: expected at least 1 query, and a number")
        if cubic is not None and len(cubic) != 4:
            raise UserError(f"cubic={list(cubic)}: expected four coefficients, of tokens to the powers 0 to 3")
        self.dense_layers, self.group_reduce, self.window, self.cubic = dense_layers, group_reduce, window, cubic

    def cosines(self, queries: Tensor, first: Tensor) -> Tensor:
        """[B, H, W] of queries [B, H*G, W, D] to the first keys [B, H, D], over the group."""
        grouped = queries.float().unflatten(1, (first.shape[1], -1))  # [B, H, G, W, D]
        cosine = torch.cosine_similarity(grouped, first.float()[:, :, None, None], dim=-1)
        return cosine.mean(2) if self.group_reduce == "mean" else cosine.amin(2)

    def begin(self, obs: Observation, tokens: Tensor) -> State:
        first = obs.valid.to(torch.int8).argmax(-1)  # [B, H]
        index = first.view(*first.shape, 1, 1).expand(-1, -1, 1, obs.keys.shape[-1])
        key = obs.keys.gather(2, index)[:, :, 0]
        cosines = self.cosines(obs.queries, key)
        there = (obs.query_positions >= 0).unsqueeze(1).expand_as(cosines).flatten(1)
        ordered = cosines.flatten(1).masked_fill(~there, torch.inf).sort(-1).values
        keep = (tokens.double() / obs.length).clamp(max=1)
        place = (torch.ceil(keep * there.sum(-1)).long() - 1).clamp(min=0)
        return {"threshold": ordered.gather(1, place.unsqueeze(-1))}

    def forward(self, lookup: Lookup, state: State) -> tuple[Tensor | None, State]:
        cosine = self.cosines(lookup.query.unsqueeze(2), lookup.keys[:, :, 0])[..., 0]  # [B, H]
        threshold = state["threshold"]
        if self.cubic is not None:
            tokens = lookup.entries.amax(1, keepdim=True).double() / 1000
            threshold = torch.stack([c * tokens**power for power, c in enumerate(self.cubic)]).sum(0)
        reads = (cosine <= threshold).unsqueeze(-1)
        number = torch.arange(lookup.keys.shape[2], device=reads.device)
        return reads & (number < lookup.entries.unsqueeze(-1)), state
