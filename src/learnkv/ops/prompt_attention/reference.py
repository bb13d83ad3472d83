"""Attention to a prompt in plain, differentiable PyTorch, a block of queries at a time."""

import torch
from torch import Tensor

from learnkv.ops.prompt_attention import blocks
from learnkv.ops.softmax_terms import SoftmaxTerms, with_sinks

_BLOCK = 2**22  # logits in memory at once: 16 MiB on a CPU, whose caches are small,
_FACTOR = 16  # and this many times more on other devices, where small blocks would cost launches only


def prompt_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, terms: SoftmaxTerms
) -> Tensor:
    """`prompt_attention` in PyTorch."""
    batch, heads, entries, dim = keys.shape
    tokens, group = query.shape[2], query.shape[1] // heads
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(query.dtype, torch.float32)
    most = _BLOCK * (1 if keys.device.type == "cpu" else _FACTOR)
    outputs = []
    for block, seen, part in blocks(tokens, entries, max(most // (batch * heads * group * entries), 1), mask):
        new = block.stop - block.start
        packed = query[:, :, block].reshape(batch, heads, group * new, dim)
        logits = terms.capped((packed @ keys[:, :, :seen].mT).to(exact) * scaling)
        if part is None:
            part = _causal(new, seen, keys.device)
        hidden = ~part.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
        logits = logits.masked_fill(hidden, -torch.inf)
        sinks = terms.of_rows(1, heads, new)
        lse = with_sinks(logits.logsumexp(-1, keepdim=True), sinks)
        weights = (logits - lse.masked_fill(lse == -torch.inf, 0)).exp().to(values.dtype)
        outputs.append((weights @ values[:, :, :seen]).view(batch, heads * group, new, dim))
    return torch.cat(outputs, 2)


def _causal(new: int, entries: int, device: torch.device) -> Tensor:
    """[1, 1, new, entries] True where the i-th of the last `new` entries may attend."""
    return torch.ones(new, entries, dtype=torch.bool, device=device).tril(entries - new).view(1, 1, new, entries)
