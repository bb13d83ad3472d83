"""Value-aware stochastic scores."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.normal_scores import normal_scores
from learnkv.scorers.random import Random


class VaSE(Scorer):
    """Another method's scores with noise, below entries whose values are unusually large (VaSE, arXiv 2606.03928).

    A small fraction of values of abnormal size must not be evicted, and chance in what is evicted keeps a more diverse
    cache. `large` of the budget goes to each head's entries with the largest values; the others are drawn without
    replacement (Gumbel noise). The draw is a function of seed, layer, head and position: results repeat, and a row of a
    batch is drawn as it would be alone.

    The defaults were made from the abstract, before there was code: sizes |v|_2, odds that rise with the rank of a
    score. The authors' variant VaSE-AttnV (`vase_decode`) has the range of a value's numbers, max v - min v, a quarter
    of the budget for the largest, and odds proportional to attention: the mean over the last 64 queries, averaged over
    5 neighbours and the query heads. There the last 64 entries take no part in the softmax and are kept in any case;
    evictions come every 64 tokens. Their other variant is `DKV`.

    Args:
        base: the scores that chance is added to.
        large: part of the budget for the largest values.
        temperature: size of the noise beside scores of unit size, or beside their logarithms; 0: none.
        seed: another seed, another draw.
        size: of a value: its `norm`, or the `range` of its numbers.
        odds: by the `ranks` of the base's scores, or proportional to the `scores` themselves.
    """

    reads_budget = True

    def __init__(
        self,
        base: Scorer,
        large: float = 0.1,
        temperature: float = 0.2,
        seed: int = 0,
        size: Literal["norm", "range"] = "norm",
        odds: Literal["ranks", "scores"] = "ranks",
    ) -> None:
        super().__init__()
        if not 0 <= large <= 1 or temperature < 0:
            raise UserError(f"large={large} temperature={temperature}: expected 0 <= large <= 1 and temperature >= 0")
        self._builds_on(base)
        self.base = base
        self.large = large
        self.temperature = temperature
        self.noise = Random(seed)
        self.size, self.odds = size, odds
        self.status = "numbers" if odds == "scores" else "abstract"

    def forward(self, obs: Observation) -> Tensor:
        draw = self.noise(obs) + 2.0**-25  # in (0, 1): the generator gives multiples of 2^-24 from 0 on
        scores = self._log_odds(obs) - self.temperature * (-draw.log()).log()
        place = self.sizes(obs).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        reserved = (self.large * obs.kept * obs.length).floor().view(-1, 1, 1)
        return torch.where(place < reserved, scores + 1e3, scores)

    def sizes(self, obs: Observation) -> Tensor:
        """Sizes of values [B, H, S], -1 where there is no entry."""
        values = obs.values.float()
        sizes = values.norm(dim=-1) if self.size == "norm" else values.amax(-1) - values.amin(-1)
        return sizes.masked_fill(~obs.valid, -1.0)

    def _log_odds(self, obs: Observation) -> Tensor:
        scores = self.base(obs)
        if self.odds == "ranks":
            return normal_scores(scores, obs.valid)
        return scores.float().clamp(min=torch.finfo(torch.float32).tiny).log()
