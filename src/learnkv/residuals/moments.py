"""MomentKV: count, means and covariance of evicted entries."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.residual_store import Parts, ResidualStore
from learnkv.errors import UserError
from learnkv.ops.evicted_moments import estimated_attention, merged_moments, weighted_moments
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms


class Moments(ResidualStore):
    """Attention to evicted entries is estimated from their moments (MomentKV, arXiv 2606.01563).

    Of the n evicted entries of a head the store has the mean key k, the mean value v and the covariance C of values
    with keys. A query q with scaling s is answered by v + s C q, with the weight of n exp(s q k) beside the softmax
    denominator of the kept entries. That is a lower bound of what the entries would have weighed; with another
    implementation it was a thirteenth in the median. Adding half the variance of s q k to the exponent, as for normal
    keys, weighs them far too much: on the reference model the KL then becomes several times as large. With soft-capped
    logits the exponent is the cap of s q k, and C is multiplied by the cap's slope there.

    `order: 0` has no covariance: the estimation zone of RetroInfer (arXiv 2505.02922) with one cluster per head.
    MomentKV also prefers to evict what the moments already describe; that rule is not public, and the policy's scorer
    decides here. Means and covariances are stored in float16, counts in float32. Keys are summarised after RoPE.

    Args:
        order: 1 with the covariance, D^2 numbers per head; 0 with the means alone.
    """

    status = "description"

    def __init__(self, order: Literal[0, 1] = 1) -> None:
        super().__init__()
        if order not in (0, 1):
            raise UserError(f"order={order}: expected 0 or 1")
        self.order = order

    def summarise(self, keys: Tensor, values: Tensor, weights: Tensor) -> Parts:
        return self._of_order(weighted_moments(keys, values, weights))

    def merged(self, first: Parts, second: Parts) -> Parts:
        return self._of_order(merged_moments(_with_covariance(first), _with_covariance(second)))

    def _of_order(self, parts: Parts) -> Parts:
        return {name: part for name, part in parts.items() if self.order or name != "covariance"}

    def attend(
        self, query: Tensor, parts: Parts, scaling: float, terms: SoftmaxTerms = NO_TERMS
    ) -> tuple[Tensor, Tensor]:
        known = (parts["count"], parts["mean_key"], parts["mean_value"], parts.get("covariance"))
        return estimated_attention(query, *known, scaling, terms)

    def rounded(self, parts: Parts) -> Parts:
        most = torch.finfo(torch.float16).max
        for name, part in parts.items():
            if name != "count" and not bool((part.abs() <= most).all()):
                raise UserError(f"residual: {name} of evicted entries has numbers that float16 does not hold")
        return {name: part.float() if name == "count" else part.to(torch.float16) for name, part in parts.items()}

    def nbytes(self, head_dim: int) -> int:
        return 4 + 2 * (2 * head_dim + (head_dim**2 if self.order else 0))


def _with_covariance(parts: Parts) -> dict[str, Tensor]:
    """All moments in float32; covariances that are not stored are 0."""
    mean = parts["mean_key"].float()
    blank = {"covariance": mean.new_zeros(*mean.shape, mean.shape[-1])}
    return blank | {name: part.float() for name, part in parts.items()}


def as_residual(residual: ResidualStore | str | None) -> ResidualStore | None:
    """The store that a policy's `residual` names: `moments`, or a store itself."""
    if residual is None or isinstance(residual, ResidualStore):
        return residual
    if residual == "moments":
        return Moments()
    raise UserError(f"residual={residual!r}: expected moments, a residual store or null")
