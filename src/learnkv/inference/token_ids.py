"""Checks of token ids and masks, and rows moved to one side of their padding."""

from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.tail_slots import padding_first, padding_last


def check_ids(ids: Tensor) -> None:
    """Raise UserError unless `ids` is [B, T] with at least one token."""
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError(f"input_ids of shape {list(ids.shape)}: expected [batch, tokens] with at least one token")


def check_mask(ids: Tensor, mask: Tensor | None) -> None:
    """Raise UserError for a mask of another shape than `ids`."""
    if mask is not None and mask.shape != ids.shape:
        raise UserError(
            f"attention_mask of shape {list(mask.shape)}: expected {list(ids.shape)}, the shape of input_ids"
        )


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `ids` and `mask` [B, T] with all padding before their tokens."""
    order = padding_first(mask)
    return ids.gather(1, order), mask.gather(1, order)


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `ids` and `mask` [B, T] with all padding after their tokens."""
    order = padding_last(mask)
    return ids.gather(1, order), mask.gather(1, order)
