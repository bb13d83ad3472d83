"""Which slots of a tail hold tokens, where rows of a batch have padding between theirs."""

import torch
from torch import Tensor


def padding_first(valid: Tensor) -> Tensor:
    """Order [..., S] of slots with padding (False in `valid`) first and all others in their order."""
    return valid.to(torch.int8).argsort(dim=-1, stable=True)


def padding_last(valid: Tensor) -> Tensor:
    """Order [..., S] of slots with padding (False in `valid`) last and all others in their order."""
    return padding_first(~valid)


def tail_slots(mask: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Slots [B, M] in the order of their tokens, padding last, and the number of tokens [B].

    Args:
        mask: [B, M] True where a slot is a token.
        used: [1] slots in use; None: all.
    """
    if used is not None:
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < used)
    return padding_last(mask), mask.sum(-1)
