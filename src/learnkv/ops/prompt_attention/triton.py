"""Attention to a prompt by the kernel of decoding: the prompt is its tail, and no entry is kept beside it."""

import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention.triton import decode_attention
from learnkv.ops.prompt_attention import blocks
from learnkv.ops.softmax_terms import SoftmaxTerms

_TOKENS = 1024
"""Queries at once: the kernel reads what lies after a query of its block, too."""


def prompt_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, terms: SoftmaxTerms
) -> Tensor:
    """`prompt_attention` in Triton."""
    batch, heads, entries, dim = keys.shape
    none = torch.zeros(batch * heads, dtype=torch.int64, device=keys.device)
    nothing = keys.new_empty(0, dim)
    kept = Ragged(nothing, nothing, none, none, 0)
    outputs = [
        decode_attention(
            query[:, :, block], kept, Tail(keys[:, :, :seen], values[:, :, :seen], part), scaling, None, (), terms
        )[0]
        for block, seen, part in blocks(query.shape[2], entries, _TOKENS, mask)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
