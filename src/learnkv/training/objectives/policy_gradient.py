"""Policy gradient over samples of what is kept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.plan import Plan
from learnkv.errors import UserError
from learnkv.ops.normal_scores import unit_scale
from learnkv.ops.ordered_draw import log_probability
from learnkv.training.objectives.base import Comparison, Objective


class PolicyGradient(Objective):
    """Another objective's loss, minimised by policy gradient over samples of the kept entries.

    Source: the description of Neural Garbage Collection (arXiv 2604.18002), which trains a model and what it evicts by
    the reward of its task: sets are drawn without replacement by Gumbel noise on scores, log p of a draw is
    sum_r [s_r - logsumexp of those left], and the advantage of a sample is its distance from the mean of a group of
    samples of the same prompt, over their standard deviation. Here the model is frozen, the reward is minus the loss of
    `loss`, each head draws what it keeps of a prompt, and what is deployed keeps the highest scores, without noise.
    log p is divided by the draws.

    A student is read once for each sample, without a backward pass through the model; budgets get no gradient. One
    number per sample has to do for all entries, where the default training has d loss / d mask of every entry; which of
    them learns faster has not been measured.

    Args:
        loss: objective whose loss is measured; it must not read the plan.
        samples: of each plan, at least 2.
        noise: scale of the Gumbel noise in units of normal scores: odds are exp(score / noise).
    """

    plans = True

    def __init__(self, loss: Objective, samples: int = 4, noise: float = 0.3) -> None:
        super().__init__()
        if samples < 2 or not noise > 0:
            raise UserError(f"samples={samples} noise={noise:g}: expected at least 2 samples and noise above 0")
        if not loss.reads or loss.plans or loss.samples:
            raise UserError(f"loss={type(loss).__name__}: expected an objective that reads continuations, and no plan")
        self.loss, self.samples, self.noise = loss, samples, noise
        self.name, self.hidden = loss.name, loss.hidden

    def forward(self, inputs: Comparison) -> Tensor:
        loss: Tensor = self.loss(inputs)
        return loss

    def over_samples(self, plan: Plan, drawn: Sequence[Plan], losses: Tensor) -> Tensor:
        """[B] mean loss of the samples, with the gradient of the policy's.

        Args:
            plan: with the gradient of its scores.
            drawn: the same with noise on the scores, one of each sample.
            losses: [N, B] of the samples.
        """
        scores = unit_scale(plan.scores) / self.noise
        first = (plan.scores == torch.inf).sum(-1)
        count = (plan.budgets.to(first.device) - first).clamp(min=0)
        draws = count.sum((0, 2)).clamp(min=1)
        losses = losses.detach()
        spread = losses.std(0, unbiased=False)
        advantages = (losses - losses.mean(0)) / spread.clamp(min=torch.finfo(losses.dtype).eps)
        value = losses.mean(0)
        for sample, advantage in zip(drawn, advantages, strict=True):
            order = sample.scores.detach().argsort(dim=-1, descending=True, stable=True)
            log_p = log_probability(scores, order, first, count).sum((0, 2)) / draws
            value = value + advantage * (log_p - log_p.detach()) / self.samples
        return value
