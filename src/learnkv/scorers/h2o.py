"""H2O scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.attention_columns import attention_columns
from learnkv.ops.reduce_group import GroupReduce, reduce_group
from learnkv.scorers.received import ReceivedAttention

_ALL = 2**31


class H2O(Scorer):
    """Attention that an entry has received from all queries since it was read: heavy hitters (arXiv 2306.14048).

    score_j = sum over the queries i >= j of softmax(q_i K / sqrt(D))_j. More queries attend to early entries, which
    score higher for it. While generating, evicted entries no longer take part in the softmax, as in the original.

    The paper spends half of the budget on the latest entries, a policy with `sinks: 0` and more `recent` entries than
    the budget does so too; KVCache-Factory keeps the last 8 and reads the prompt only. Which queries are added up
    differs in print: copies of the method in the baselines of other papers let every query but the last few attend to
    what comes after it.

    Args:
        group_reduce: mean, maximum or sum over the query heads that share a kv head. The original has one kv head per
            query head.
        recent: latest entries that come before all others, whatever the budget.
        causal: whether a query sees only what precedes it; False reproduces the faulty copies, at the cost of holding
            all queries of the prompt.
        window: last queries that are causal even then.
    """

    status = "numbers"

    def __init__(
        self, group_reduce: GroupReduce = "mean", recent: int = 0, causal: bool = True, window: int = 8
    ) -> None:
        super().__init__()
        if recent < 0 or window < 0:
            raise UserError(f"recent={recent} window={window}: expected numbers of entries >= 0")
        self.group_reduce = group_reduce
        self.recent = recent
        self.causal_window = window
        if causal:
            self.statistics = frozenset({ReceivedAttention()})
        else:
            self.window = _ALL

    def forward(self, obs: Observation) -> Tensor:
        received = self._acausal(obs) if self.window else obs.statistics[ReceivedAttention()].transpose(2, 3)
        scores = reduce_group(received, self.group_reduce)
        latest = obs.positions >= (obs.length - self.recent).view(-1, 1, 1)
        # Received attention is at most the number of queries in a head's sum; 1 + position keeps the latest in order.
        above = scores.masked_fill(~obs.valid, 0.0).amax(-1, keepdim=True)
        return torch.where(latest, above + 1 + obs.positions, scores)

    def _acausal(self, obs: Observation) -> Tensor:
        """Attention that entries receive from all queries, of which all but the last ones see every entry."""
        query_positions, last = obs.query_positions, obs.length.unsqueeze(-1)
        acausal = (query_positions >= 0) & (query_positions < last - self.causal_window)
        sees = torch.where(acausal, last, query_positions)
        return attention_columns(
            obs.queries,
            obs.keys,
            query_positions=sees,
            positions=obs.positions,
            valid=obs.valid,
            scaling=obs.scaling,
            terms=obs.terms,
        )
