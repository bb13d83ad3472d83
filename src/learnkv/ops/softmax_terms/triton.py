"""Soft caps and sinks within kernels, whose logits are in units of log 2; without them nothing is compiled."""

import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.softmax_terms import SoftmaxTerms

_LOG2E = 1.4426950408889634


def kernel_terms(terms: SoftmaxTerms, scaling: float) -> tuple[float, float | None, Tensor | None]:
    """The factor on products, the cap in units of log 2, and sinks in natural units, as kernels take them."""
    sinks = None if terms.sinks is None else terms.sinks.contiguous()
    if terms.softcap is None:
        return scaling * _LOG2E, None, sinks
    return scaling / terms.softcap, terms.softcap * _LOG2E, sinks


@triton.jit
def cap(scores, softcap):
    """Logits of products, to which the factor was applied; `softcap` None: they are logits already."""
    if softcap is not None:
        # Near 0 the quotient would cancel: there the series, whose first missing term is x^9 / 46.
        square = scores * scores
        series = scores * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
        size = tl.abs(scores)
        less = tl.exp2(size * -2.8853900817779268)
        quotient = (1 - less) / (1 + less)
        quotient = tl.where(scores < 0, -quotient, quotient)
        scores = tl.where(size < 0.25, series, quotient) * softcap
    return scores


@triton.jit
def steepen(slope, scores, softcap):
    """Gradient with respect to products of that with respect to logits, of which `scores` are those with the cap."""
    if softcap is not None:
        share = scores / softcap
        slope = slope * (1 - share * share)
    return slope


@triton.jit
def first_logits(sinks, query_head, valid, BLOCK_M: tl.constexpr):
    """Largest logit and mass [BLOCK_M] with which a softmax begins: those of the sink, or of nothing."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + query_head, valid, other=0).to(tl.float32) * 1.4426950408889634
        mass = tl.full([BLOCK_M], 1, tl.float32)
    return top, mass
