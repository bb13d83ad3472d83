"""What some models' softmax has beside scaled query-key products: a soft cap of the logits, and attention sinks."""

from typing import NamedTuple

import torch
from torch import Tensor


class SoftmaxTerms(NamedTuple):
    """Soft cap of logits (Gemma 2, arXiv 2408.00118) and learned attention sinks (gpt-oss, arXiv 2508.10925)."""

    softcap: float | None = None
    """c: a scaled product z counts as c tanh(z / c), before the mask; None: as it is."""
    sinks: Tensor | None = None
    """[H*G] a logit of every query head that is in the denominator once and has no value; None: none."""

    def capped(self, logits: Tensor) -> Tensor:
        """Scaled products with the soft cap."""
        return logits if self.softcap is None else (logits / self.softcap).tanh().mul(self.softcap)

    def slope(self, capped: Tensor) -> Tensor | None:
        """Derivative of capped logits with respect to scaled products; None: 1."""
        return None if self.softcap is None else 1 - (capped / self.softcap).square()

    def copied(self) -> "SoftmaxTerms":
        """With sinks that outlive the weights, which may be gathered for one pass only."""
        return self if self.sinks is None else SoftmaxTerms(self.softcap, self.sinks.detach().clone())

    def of_heads(self, heads: int) -> Tensor | None:
        """Sinks [H, G, 1] of the query heads of every kv head."""
        return None if self.sinks is None else self.sinks.view(heads, -1, 1)

    def of_query_heads(self, query_heads: Tensor) -> "SoftmaxTerms":
        """Of some query heads [N]."""
        return self if self.sinks is None else SoftmaxTerms(self.softcap, self.sinks[query_heads])

    def of_rows(self, batch: int, heads: int, new: int) -> Tensor | None:
        """Sinks [B*H, G*T, 1] of T packed queries of every kv head."""
        sinks = self.of_heads(heads)
        return None if sinks is None else sinks.expand(batch, heads, -1, new).reshape(batch * heads, -1, 1)


def at_least(top: Tensor, sinks: Tensor | None) -> Tensor:
    """The largest logits [..., 1], of which the sinks are some."""
    return top if sinks is None else torch.maximum(top, sinks.to(top.dtype))


def times(gradient: Tensor, slope: Tensor | None) -> Tensor:
    """A gradient with respect to logits, multiplied by their `slope`."""
    return gradient if slope is None else gradient * slope


NO_TERMS = SoftmaxTerms()
"""Of most models."""


def with_sinks(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Log-sum-exp of logits and sinks, from that of the logits; sinks are broadcast."""
    return lse if sinks is None else torch.logaddexp(lse, sinks.to(lse.dtype))


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension, whose denominator has the sinks, too; these are broadcast to [..., 1]."""
    if sinks is None:
        return logits.softmax(-1)
    return (logits - with_sinks(logits.logsumexp(-1, keepdim=True), sinks)).exp()
