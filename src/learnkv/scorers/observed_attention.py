"""Mean attention over the queries that see an entry."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.ops.reduce_group import GroupReduce, reduce_group
from learnkv.scorers.received import ReceivedAttention


class ObservedAttention(Scorer):
    """H2O's sum divided by the number of queries that can see the entry, so that age alone does not count.

    score_j = 1/(n - j) * sum over the queries i >= j of softmax(q_i K / sqrt(D))_j, n tokens read; the definition of
    kvpress' press of that name, where the latest entries are not protected.

    Args:
        group_reduce: mean, maximum or sum over the query heads that share a kv head.
    """

    status = "numbers"

    def __init__(self, group_reduce: GroupReduce = "mean") -> None:
        super().__init__()
        self.statistics = frozenset({ReceivedAttention()})
        self.group_reduce = group_reduce

    def forward(self, obs: Observation) -> Tensor:
        received = reduce_group(obs.statistics[ReceivedAttention()].transpose(2, 3), self.group_reduce)
        return received / (obs.length.view(-1, 1, 1) - obs.positions).clamp(min=1)
