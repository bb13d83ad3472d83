"""A heuristic's scores, moved by something learned."""

from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.observation import Observation, Statistic
from learnkv.ops.normal_scores import normal_scores
from learnkv.scorers.base import Judgement, Scorer


@dataclass(frozen=True, eq=False)
class TokenFigures(Statistic):
    """What a scorer makes of every token when it is read, held with its entries: [B, H, S, F].

    Hidden states, and the keys and values of other heads, are not there any more when entries are judged later.
    """

    scorer: "Residual"

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        new = slice(chunk.keys.shape[2] - chunk.queries.shape[2], None)
        entries = {name: getattr(chunk, name)[:, :, new] for name in ("keys", "values", "valid", "positions")}
        hidden = None if chunk.hidden is None else chunk.hidden[:, -chunk.queries.shape[2] :]
        made = self.scorer.figures(replace(chunk, hidden=hidden, **entries))
        return made if gathered is None else torch.cat([gathered, made], 2)


class Residual(Scorer):
    """Normal scores of a heuristic's ranks plus a correction that is learned, entry by entry, and zero at first.

    At first every order, within a head and between the heads of a layer, is the heuristic's, ties included. A scorer
    that starts from nothing has `Constant` for its base.

    Args:
        base: the heuristic to start from: any whose scores alone decide. One that orders within each head by how much
            that head keeps (`CriticalKV`, a `LearnedScorer` with `sampling`) is refused.
        num_layers, num_heads: the model's.
    """

    def __init__(self, base: Scorer, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self._builds_on(base)
        self.base = base
        self.shape = (num_layers, num_heads)
        self._figures = TokenFigures(self)

    @abstractmethod
    def correction(self, seen: Observation, prior: Tensor) -> Tensor:
        """[B, H, S], differentiable, from what is seen and the heuristic's normal scores [B, H, S]."""

    @abstractmethod
    def figures(self, seen: Observation) -> Tensor:
        """[B, H, S, F], what the correction takes from the token alone, where the scorer says `_reads_tokens`."""

    def _reads_tokens(self, *needs: str) -> None:
        """Ask for these `needs` of a prompt, and for `figures` of each token where later ones are judged, too."""
        self.needs, self.later = self.needs | set(needs), self.later | {self._figures}

    def of_tokens(self, seen: Observation) -> Tensor:
        """`figures` of all entries, as they were when the tokens were read."""
        return self.figures(seen) if seen.aligned else seen.statistics[self._figures]

    def forward(self, seen: Observation) -> Tensor:
        return self.judge(seen).scores

    def judge(self, seen: Observation) -> Judgement:
        layers, heads = self.shape
        if seen.layer_idx >= layers or seen.keys.shape[1] != heads:
            raise UserError(
                f"num_layers={layers} num_heads={heads}: the model has layer {seen.layer_idx} with {seen.keys.shape[1]}"
            )
        with torch.no_grad():
            start = self.base(seen)
            prior = normal_scores(start, seen.valid)
        return Judgement(prior + self.correction(seen, prior), start, prior)


def unit(vectors: Tensor) -> Tensor:
    """The same directions with mean square 1, float32 [..., F] from vectors [..., F]; zeros stay zeros."""
    vectors = vectors.float()
    return vectors * vectors.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
