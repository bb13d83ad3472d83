"""Which slots of a tail hold tokens, where rows of a batch have padding between theirs, and which a token may read."""

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


def causal_tail(new: int, slots: int, device: torch.device, used: Tensor | None = None) -> Tensor:
    """[1, 1, new, slots] True where the i-th of the last `new` slots in use may attend."""
    slot = torch.arange(slots, device=device)
    own = torch.arange(new, device=device) - new + (slots if used is None else used)
    return (slot <= own.unsqueeze(-1)).view(1, 1, new, slots)
