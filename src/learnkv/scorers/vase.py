"""Value-aware stochastic scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.normal_scores import normal_scores
from learnkv.scorers.random import Random


class VaSE(Scorer):
    """Another method's scores with noise, below entries whose values are unusually large (VaSE, arXiv 2606.03928).

    Of this method the abstract is public, no code: it finds that a small fraction of values of abnormal size must not
    be evicted and that chance in what is evicted raises accuracy by keeping a more diverse cache. How is our reading:
    `large` of the budget goes to each head's entries with the largest |v|_2; the others are drawn without replacement,
    with odds that rise with their rank (Gumbel noise on normal scores of the ranks that `base` gives). The draw is a
    function of seed, layer, head and position: results repeat, and a row of a batch is drawn as it would be alone.

    Args:
        base: the scores that chance is added to.
        large: part of the budget for the largest values.
        temperature: size of the noise beside scores of unit size; 0: none.
        seed: another seed, another draw.
    """

    reads_budget = True

    def __init__(self, base: Scorer, large: float = 0.1, temperature: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= large <= 1 or temperature < 0:
            raise UserError(f"large={large} temperature={temperature}: expected 0 <= large <= 1 and temperature >= 0")
        self._builds_on(base)
        self.base = base
        self.large = large
        self.temperature = temperature
        self.noise = Random(seed)

    def forward(self, obs: Observation) -> Tensor:
        draw = self.noise(obs) + 2.0**-25  # in (0, 1): the generator gives multiples of 2^-24 from 0 on
        scores = normal_scores(self.base(obs), obs.valid) - self.temperature * (-draw.log()).log()
        sizes = obs.values.float().norm(dim=-1).masked_fill(~obs.valid, -1.0)
        place = sizes.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        reserved = (self.large * obs.kept * obs.length).floor().view(-1, 1, 1)
        return torch.where(place < reserved, scores + 1e3, scores)
