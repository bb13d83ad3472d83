"""Token ids: checks, rows moved to one side of their padding, and the ids that a cache has read."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core import finite
from learnkv.errors import UserError
from learnkv.inference.models import embedded_tokens
from learnkv.ops.tail_slots import padding_first, padding_last


class Sequence(NamedTuple):
    """All tokens that precede the next one, as transformers' generate() would be given them."""

    ids: Tensor
    """[B, S] left-padded to the longest row."""
    mask: Tensor | None
    """[B, S] 1 for tokens, 0 for padding; None: no padding."""


def check_ids(ids: Tensor, model: PreTrainedModel) -> None:
    """Raise UserError unless `ids` is [B, T] of whole numbers with at least one token.

    Ids in a CPU's memory also have to be embedded by the model; on a device that would cost a host sync.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"input_ids of type {kind}: expected a tensor of int64 or int32")
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError(f"input_ids of shape {list(ids.shape)}: expected [batch, tokens] with at least one token")
    if ids.device.type not in finite.READ_AT_ONCE:
        return
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < 0 or largest >= embedded_tokens(model):
        outside = smallest if smallest < 0 else largest
        raise UserError(f"input_ids: {outside} is no token of this model, which embeds {embedded_tokens(model)}")


def check_mask(ids: Tensor, mask: Tensor | None) -> None:
    """Raise UserError for a mask of another shape than `ids`."""
    if mask is not None and mask.shape != ids.shape:
        raise UserError(
            f"attention_mask of shape {list(mask.shape)}: expected {list(ids.shape)}, the shape of input_ids"
        )
    if mask is not None and mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise UserError("attention_mask: expected 1 for tokens and 0 for padding, got other numbers")


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `ids` and `mask` [B, T] with all padding before their tokens."""
    order = padding_first(mask)
    return ids.gather(1, order), mask.gather(1, order)


def right_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `ids` and `mask` [B, T] with all padding after their tokens."""
    order = padding_last(mask)
    return ids.gather(1, order), mask.gather(1, order)


def record_ids(cache: CompressedCache, ids: Tensor) -> None:
    """Record the ids [B, T] of the next slots; the cache forgets all ids where others were read without it."""
    read = _read_ids(cache)
    cache.token_ids = None if read is None else (read[0], torch.cat([read[1].to(ids.device), ids], 1))


def replace_last_ids(cache: CompressedCache, begin: int, ids: Tensor) -> None:
    """Record that the slots from `begin` on, counted from the end of the prompt, are `ids` [B, T]."""
    if cache.token_ids is not None:
        prompt, new = cache.token_ids
        cache.token_ids = (prompt, torch.cat([new[:, :begin], ids.to(new.device)], 1))


def refuse_unknown_ids(cache: CompressedCache, setting: str) -> None:
    """Raise UserError for a cache whose tokens were not all read by learnkv, with the setting that counts them."""
    if _read_ids(cache) is None:
        raise UserError(
            f"{setting} counts the tokens of the prompt, which this cache does not know: read it with learnkv.prefill, "
            "continue it with learnkv.generate or learnkv.continuation"
        )


def sequence_with(cache: CompressedCache, ids: Tensor, mask: Tensor) -> Sequence:
    """All tokens of the cache, then `ids` [B, T], which are tokens where `mask` [B, T]."""
    read = _read_ids(cache)
    assert read is not None
    tokens = torch.cat([part.to(ids.device) for part in (*read, ids)], 1)
    is_token = torch.cat([part.to(ids.device) for part in (cache.prompt_mask, cache.is_token(), mask.bool())], 1)
    if cache.tail_padded or not bool(mask.all()):
        tokens, is_token = left_padded(tokens, is_token)
    padding = is_token.shape[1] - int(is_token.sum(-1).max())
    is_token = is_token[:, padding:]
    return Sequence(tokens[:, padding:], None if bool(is_token.all()) else is_token.long())


def _read_ids(cache: CompressedCache) -> tuple[Tensor, Tensor] | None:
    """Ids of the prompt's slots [B, S] and of those after it [B, M]; None where they are not all known."""
    if cache.token_ids is None:
        return None
    prompt, new = cache.token_ids
    new = new[:, : cache.continuation_length]
    return (prompt, new) if new.shape[1] == cache.continuation_length else None


def refuse_gaps(cache: CompressedCache, is_token: Tensor) -> None:
    """Raise where padding within [B, S + M] would count in a hybrid model: as distance in a window, or in a state."""
    states = bool(cache.state_layers())
    window = min((cache.layers[index].sliding_window for index in cache.sliding), default=0)
    slots, gap = is_token.shape[1], ~is_token[:, 1:] & is_token[:, :-1]
    if (states or slots > window) and bool((gap.cumsum(-1).bool() & is_token[:, 1:]).any()):
        those = "states that padding would change" if states else f"layers that attend to the last {window} slots"
        raise UserError(
            f"padding between the tokens of a row, {slots} slots, and {those}: continue prompts one by one, or with "
            "questions of one length"
        )
