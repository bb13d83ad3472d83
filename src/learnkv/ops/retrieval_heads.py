"""How much a query head takes part in retrieving a needle while an answer is generated, after three definitions.

Each takes the attention of the steps of one trial and gives one score per head. Step s is the query that predicts the
s-th token of the answer; it sees the whole prompt and the s tokens that were said before.

    attention: [Q, ..., S] softmax weights of Q steps for any dimensions of heads, 0 where a step sees nothing.
    tokens: [S] ids of the prompt, then of what was said.
    said: [Q] id that each step predicts.
    needle: first and last but one position of the sentence that holds the answer.
"""

import torch
from torch import Tensor

Span = tuple[int, int]


def copying(attention: Tensor, tokens: Tensor, said: Tensor, needle: Span) -> Tensor:
    """Retrieval heads (arXiv 2404.15574): part of the needle that a head copies.

    A step counts 1/N of the needle's N tokens for a head whose highest weight is on the needle, at the very token that
    is predicted.
    """
    start, end = needle
    at = attention.argmax(-1)  # [Q, ...]
    spoken = said.view(-1, *[1] * (at.ndim - 1))
    return ((at >= start) & (at < end) & (tokens[at] == spoken)).sum(0).float() / (end - start)


def reasoning(attention: Tensor, tokens: Tensor, said: Tensor, needle: Span) -> Tensor:
    """Retrieval-reasoning heads (HeadKV, arXiv 2410.19258): weight on the needle among a head's N highest weights, / N.

    What is predicted does not matter, so heads that choose between candidates count as well as those that copy.
    """
    start, end = needle
    top = attention.topk(min(end - start, attention.shape[-1]), dim=-1)
    inside = (top.indices >= start) & (top.indices < end)
    return (top.values * inside).sum((0, -1)) / (end - start)


def semantic(attention: Tensor, tokens: Tensor, said: Tensor, needle: Span) -> Tensor:
    """Semantic retrieval heads (CompressKV, arXiv 2508.02401): a head's whole weight on the needle, at copying steps.

    A step counts once for every token of the needle that equals the predicted one.
    """
    start, end = needle
    times = (tokens[start:end] == said.unsqueeze(-1)).sum(-1)  # [Q]
    mass = attention[..., start:end].sum(-1)  # [Q, ...]
    return torch.einsum("q,q...->...", times.to(mass.dtype), mass)
