"""Retrieval scores of query heads: three definitions of how much a head retrieves a needle for an answer.

All take the attention of the steps of one trial and return one score per head. Step s is the query that predicts the
s-th token of the answer; it attends to the whole prompt and the s tokens before.

    attention: [Q, ..., S] softmax weights of Q steps for any dimensions of heads, 0 for entries after the step.
    tokens: [S] ids of the prompt, then of the answer.
    predicted: [Q] id that each step predicts.
    needle: first and last but one position of the sentence that holds the answer.
"""

import torch
from torch import Tensor

Span = tuple[int, int]


def copying(attention: Tensor, tokens: Tensor, predicted: Tensor, needle: Span) -> Tensor:
    """Retrieval heads (arXiv 2404.15574): part of the needle that a head copies.

    A step counts 1/N of the needle's N tokens for a head whose highest weight is on the needle, at the very token that
    is predicted.
    """
    begin, end = needle
    top = attention.argmax(-1)  # [Q, ...]
    copied = tokens[top] == predicted.view(-1, *[1] * (top.ndim - 1))
    return ((top >= begin) & (top < end) & copied).sum(0).float() / (end - begin)


def reasoning(attention: Tensor, tokens: Tensor, predicted: Tensor, needle: Span) -> Tensor:
    """Retrieval-reasoning heads (HeadKV, arXiv 2410.19258): weight on the needle among a head's N highest weights, / N.

    What is predicted does not matter, so heads that choose between candidates count as well as those that copy.
    """
    begin, end = needle
    top = attention.topk(min(end - begin, attention.shape[-1]), dim=-1)
    inside = (top.indices >= begin) & (top.indices < end)
    return (top.values * inside).sum((0, -1)) / (end - begin)


def semantic(attention: Tensor, tokens: Tensor, predicted: Tensor, needle: Span) -> Tensor:
    """Semantic retrieval heads (CompressKV, arXiv 2508.02401): a head's whole weight on the needle, at copying steps.

    A step counts once for every token of the needle that equals the predicted one.
    """
    begin, end = needle
    times = (tokens[begin:end] == predicted.unsqueeze(-1)).sum(-1)  # [Q]
    mass = attention[..., begin:end].sum(-1)  # [Q, ...]
    return torch.einsum("q,q...->...", times.to(mass.dtype), mass)
