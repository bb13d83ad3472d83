"""What the positions that a query head attends to add to the logit of a token."""

import torch
from torch import Tensor


def logit_contribution(
    attention: Tensor, values: Tensor, projection: Tensor, unembedding: Tensor, bias: Tensor | float = 0.0
) -> Tensor:
    """Contribution [H, G, A, S] of every entry to the logit of each step's token (LOCOS, arXiv 2607.01002).

    phi = alpha * (u W_O v + bias), with the raw row u of the output matrix: the final norm is left out.

    Args:
        attention: [H, G, A, S] softmax weights of A steps.
        values: [H, S, D].
        projection: [E, H*G*D] matrix from the heads' outputs to the layer's.
        unembedding: [A, E] row of the output matrix of each step's token.
        bias: [A] or a number, of a lens that translates the layer's output.
    """
    heads, group, steps, _ = attention.shape
    readout = (unembedding @ projection).view(steps, heads, group, -1)  # [A, H, G, D]
    logits = torch.einsum("ahgd,hsd->hgas", readout, values)
    if isinstance(bias, Tensor):
        bias = bias.unsqueeze(-1)
    return attention * (logits + bias)


def on_and_off(contribution: Tensor, needle: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sums over the needle and over all other entries, the latter as if they were as many: [H, G, A] each.

    Args:
        contribution: [H, G, A, S].
        needle: first and last but one position of the sentence that holds the answer.
    """
    begin, end = needle
    on = contribution[..., begin:end].sum(-1)
    others = contribution.shape[-1] - (end - begin)
    return on, (contribution.sum(-1) - on) * ((end - begin) / max(others, 1))
