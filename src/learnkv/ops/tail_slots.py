"""Which slots of a tail hold tokens, where rows of a batch have padding between theirs."""

import torch
from torch import Tensor


def tail_slots(seen: Tensor, tail_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Slots [B, M] in the order of the tokens that they hold, padding last, and the number of tokens [B].

    Args:
        seen: [B, M] True where a slot is a token.
        tail_length: [1] slots in use; None: all.
    """
    if tail_length is not None:
        seen = seen & (torch.arange(seen.shape[1], device=seen.device) < tail_length)
    return (~seen).to(torch.int8).argsort(dim=-1, stable=True), seen.sum(-1)
