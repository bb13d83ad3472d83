"""KVgrad scores."""

from collections.abc import Sequence

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.scorers.repetition import Repetition


class KVgrad(Scorer):
    """What an entry adds while the model repeats the prompt, times how much the model's output depends on it (KVgrad).

    score_j = max over the queries p of the pass and the query heads of A_pj |W_O v_j|_2 |d Phi / d a_p|_2, A the
    attention of KVzip's passes (see `KVzip`), a_p the layer's residual stream after attention, and Phi the sum of
    |h_p|^2 over the last layer's outputs before the final norm. Source: the authors' press in kvpress (pull request
    279) and https://openreview.net/forum?id=cg1wTCJjjk. The gradient is taken at the output of the attention, which is
    the same where that is simply added to the stream. Every pass is computed twice, once of them with a backward pass.
    Budgets follow one ranking of all layers and heads: the allocator `Flat`.

    Args:
        prefix: first tokens (system prompt, chat template) that are not repeated and come before all others.
        sinks: first tokens that take part in every softmax.
        chunk: tokens repeated in one pass.
        overlap: last tokens of the chunk before that introduce the next one.
        before: ids read in front of every chunk and its introduction.
        after: ids read between the introduction and the chunk.
    """

    status = "description"
    functions = frozenset({"projection"})

    def __init__(
        self,
        prefix: int = 0,
        sinks: int = 4,
        chunk: int = 512,
        overlap: int = 8,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.prefix = prefix
        lead = (tuple(before), tuple(after))
        self.repetition = Repetition(prefix, sinks, chunk, overlap, *lead, gradients=True)
        self.extra_passes = frozenset({self.repetition})

    def forward(self, obs: Observation) -> Tensor:
        scores = obs.statistics[self.repetition][..., 0]
        above = scores.masked_fill(~obs.valid, 0.0).amax((1, 2), keepdim=True) + 1
        return scores.where(obs.positions >= self.prefix, above)
