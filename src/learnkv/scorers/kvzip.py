"""KVzip scores."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.formats import heads as head_table
from learnkv.scorers.repetition import Repetition

_ABOVE_ALL = 1e6  # of scores that are attention, or attention times a ratio of norms


class KVzip(Scorer):
    """Largest attention that an entry gets when the model repeats the prompt (KVzip, arXiv 2505.23416).

    score_j = max over the queries i of the pass, and over the query heads of a kv head, of softmax(q_i K / sqrt(D))_j,
    K the keys of the first `sinks` tokens, of the chunk that is being repeated, and of the pass itself. The prompt is
    read a second time for it, `chunk` tokens per pass, after the instruction `before`, the end of the chunk before, and
    `after` (the original: "repeat the previous context" in words, then the end of the user's turn; without ids the
    chunk alone is read). The maximum is over the queries of the instruction too.

    KVzip+ (`normalized`) multiplies by ||v_j W_O|| / ||x_i||, x_i the layer's input at the query. KVzap's regression
    target is its logarithm with a softmax over all that is seen and with the queries of the repeated tokens only.

    The original has the whole prefix in every softmax (`sinks` = `prefix`) and never evicts it; kvpress has four
    tokens, gives the rest of the prefix 0 so that it goes first, and until 0.5.4 protected the sinks with a score of 1
    that KVzip+ may exceed. Budgets follow one ranking of all layers and heads: the allocator `Flat`.

    Args:
        prefix: first tokens (system prompt, chat template) that are not repeated and come before all others.
        sinks: first tokens that take part in every softmax.
        chunk: tokens repeated in one pass; the prompt and a pass must fit into the model's context.
        overlap: last tokens of the chunk before that introduce the next one.
        before: ids read in front of every chunk and its introduction.
        after: ids read between the introduction and the chunk.
        normalized: KVzip+.
        softmax: over sinks, chunk and pass, or over `all` that the query sees.
        queries: those of the whole pass, or of the `repeated` tokens.
        log: natural logarithm of the scores.
        first: what comes before all others: the whole `prefix`, or the `sinks` only, the rest of the prefix being last;
            `one`: as `sinks`, with a score of 1.
        heads: file with one figure per kv head that takes the place of all this, the head-level variant: no extra pass,
            heads with low figures lose everything but the prefix.
    """

    status = "numbers"

    def __init__(
        self,
        prefix: int = 0,
        sinks: int = 4,
        chunk: int = 2000,
        overlap: int = 8,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        normalized: bool = False,
        softmax: Literal["chunk", "all"] = "chunk",
        queries: Literal["all", "repeated"] = "all",
        log: bool = False,
        first: Literal["prefix", "sinks", "one"] = "prefix",
        heads: str | None = None,
    ) -> None:
        super().__init__()
        self.prefix, self.sinks, self.log, self.first = prefix, sinks, log, first
        self.repetition = Repetition(
            prefix, sinks, chunk, overlap, tuple(before), tuple(after), normalized, softmax, queries
        )
        self.heads = None if heads is None else head_table.read(heads)
        if heads is None:
            self.extra_passes = frozenset({self.repetition})

    def forward(self, obs: Observation) -> Tensor:
        if self.heads is None:
            scores = obs.statistics[self.repetition][..., 0]
            if self.log:
                scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        else:
            scores = self._of_head(obs).expand(obs.valid.shape)
        if self.first == "prefix":
            return scores.masked_fill(obs.positions < self.prefix, _ABOVE_ALL)
        scores = scores.masked_fill(obs.positions < self.prefix, 0.0)
        if self.first == "sinks":
            return scores.masked_fill(obs.positions < self.sinks, _ABOVE_ALL)
        return scores.masked_fill(obs.positions < min(self.sinks, self.prefix), 1.0)

    def _of_head(self, obs: Observation) -> Tensor:
        """Scores [1, H, 1] of the layer's heads."""
        assert self.heads is not None
        layers, heads = self.heads.shape
        if obs.layer_idx >= layers or obs.keys.shape[1] != heads:
            raise UserError(
                f"heads: figures of {layers} layers of {heads} kv heads, the model has layer {obs.layer_idx} with "
                f"{obs.keys.shape[1]}"
            )
        return self.heads[obs.layer_idx].float().to(obs.keys.device).view(1, -1, 1)
