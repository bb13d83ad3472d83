"""Storage: kept entries of a prompt (one pool, ragged rows) and the decode buffer of what follows it."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from learnkv.core.observation import Statistic
from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.spans import Spans

TAIL_CHUNK = 64


@dataclass(frozen=True)
class Segment:
    """The kept entries of one layer: rows of a shared pool. Row r = b * H + h; rows may alias."""

    keys: Tensor
    """[N, D] pool, shared by all layers on the device."""
    values: Tensor
    """[N, D]."""
    positions: Tensor
    """[N] int32 prompt position of every entry."""
    offset: Tensor
    """[B*H] int64."""
    length: Tensor
    """[B*H] int64."""
    longest: int
    """Upper bound of `length`, known on the host."""
    statistics: Mapping[Statistic, Tensor] = field(default_factory=dict)
    """[N, F] of every entry, for scorers that evict again while tokens are added."""
    rotated: Tensor | None = None
    """[N] int32 position that every key is rotated to; None: its prompt position."""

    @classmethod
    def whole(cls, keys: Tensor, values: Tensor, positions: Tensor) -> "Segment":
        """A view of a prompt [B, H, S, D], left-padded, whose slots have `positions` [B, S], -1 for padding."""
        batch, heads, slots, dim = keys.shape
        padding = (positions < 0).sum(-1)
        offset = torch.arange(batch * heads, device=keys.device) * slots + padding.repeat_interleave(heads)
        of_entry = positions.to(torch.int32).unsqueeze(1).expand(batch, heads, slots).reshape(-1)
        length = (slots - padding).repeat_interleave(heads)
        return cls(keys.view(-1, dim), values.view(-1, dim), of_entry, offset, length, slots)

    @classmethod
    def empty(cls, like: Tensor, zeros: Tensor) -> "Segment":
        """Rows without entries, of prompts `like` [B, H, S, D]; `zeros` [B*H] serves as both tables."""
        pool = like.new_empty(0, like.shape[-1])
        positions = torch.empty(0, dtype=torch.int32, device=like.device)
        return cls(pool, pool, positions, zeros, zeros, 0)

    @functools.cached_property
    def ragged(self) -> Ragged:
        """The rows as ops take them; on a CPU with the host's copy of both tables, read once."""
        spans = None
        if self.offset.device.type == "cpu":
            spans = Spans(zip(self.offset.tolist(), self.length.tolist(), strict=True))
        return Ragged(self.keys, self.values, self.offset, self.length, self.longest, spans)

    def rows(self, batch: Tensor, heads: int) -> "Segment":
        """The segment of batch rows `batch` [B'], sharing the pool."""
        batch = batch.to(self.offset.device)
        offset, length = (table.view(-1, heads)[batch].flatten() for table in (self.offset, self.length))
        return replace(self, offset=offset, length=length)

    def on(self, device: torch.device) -> "Segment":
        """The segment with its pool on a device: itself, or a copy of a pool that the host holds."""
        if self.keys.device == device:
            return self
        keys, values = (part.to(device, non_blocking=True) for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def padded(self, slots: int) -> tuple[Tensor, Tensor]:
        """Index into the pool [B*H, slots] of every row's entries, at the end of its slots, and which are entries."""
        entry = torch.arange(slots, device=self.offset.device) - (slots - self.length).unsqueeze(-1)
        valid = entry >= 0
        return (self.offset.unsqueeze(-1) + entry).masked_fill(~valid, 0), valid

    def row_nbytes(self) -> list[int]:
        """Bytes of every row's entries, positions and tables (host sync); a table that all layers share not counted."""
        entry = 2 * self.keys[:1].nbytes + self.positions.element_size() + self.extra_nbytes if len(self.keys) else 0
        tables = 0 if self.length is self.offset else self.offset.element_size() + self.length.element_size()
        return [count * entry + tables for count in self.length.tolist()]

    @property
    def extra_nbytes(self) -> int:
        """Bytes of an entry's statistics, and of the position that its key is rotated to."""
        parts = [*self.statistics.values(), *(() if self.rotated is None else (self.rotated,))]
        return sum(part[:1].nbytes for part in parts)

    def row_positions(self, row: int) -> Tensor:
        """Ascending prompt positions [length] of one row (host sync)."""
        offset = int(self.offset[row])
        return self.positions[offset : offset + int(self.length[row])]

    def tensors(self) -> list[Tensor]:
        """All tensors of the segment."""
        always = [self.keys, self.values, self.positions, self.offset, self.length, *self.statistics.values()]
        return always if self.rotated is None else [*always, self.rotated]


def can_write(tensor: Tensor) -> bool:
    """Whether `tensor` can change in place: what was made in `torch.inference_mode` cannot, outside of it."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


class DecodeBuffer:
    """Keys and values read after compression: buffers [B, H, capacity, D] that grow by chunks.

    Without gradients new entries are written in place; with gradients the buffers are extended functionally, because
    what was saved for a backward pass must not change. A fork shares the buffers until either grows.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int, writable: bool = False) -> None:
        self._keys, self._values, self.length, self._writable = keys, values, length, writable
        self.visible: Tensor | None = None
        """[B, length] slots that the newest token attended to; None: all."""
        self.cursor: Tensor | None = None
        """[2] on the device: slots in use and the slot of the next token, while a CUDA graph may replay a step; keys
        and values are then the whole buffers."""

    @classmethod
    def empty_like(cls, keys: Tensor, values: Tensor) -> "DecodeBuffer":
        """A buffer without capacity for entries shaped like [B, H, T, D]."""
        return cls(keys[:, :, :0].detach().clone(), values[:, :, :0].detach().clone(), 0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add [B, H, T, D]."""
        end = self.length + keys.shape[2]
        if self.cursor is not None:
            self._keys.index_copy_(2, self.cursor[1:], keys)
            self._values.index_copy_(2, self.cursor[1:], values)
            return
        if torch.is_grad_enabled():
            self._keys = torch.cat([self.keys, keys], 2)
            self._values = torch.cat([self.values, values], 2)
            self._writable = False
        else:
            self.reserve(new := keys.shape[2])
            self._keys.narrow(2, self.length, new).copy_(keys)
            self._values.narrow(2, self.length, new).copy_(values)
        self.length = end

    def reserve(self, slots: int) -> int:
        """Allocate `slots` more slots, so that appending them allocates nothing; returns the capacity."""
        end = self.length + slots
        if end <= self.capacity and self._writable and can_write(self._keys):
            return self.capacity
        capacity = -(-end // TAIL_CHUNK) * TAIL_CHUNK
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)
        self._writable = True
        return capacity

    @property
    def capacity(self) -> int:
        """Slots that are allocated."""
        return self._keys.shape[2]

    @property
    def keys(self) -> Tensor:
        """[B, H, length, D]."""
        return self._keys if self.cursor is not None else self._keys.narrow(2, 0, self.length)

    @property
    def values(self) -> Tensor:
        """[B, H, length, D]."""
        return self._values if self.cursor is not None else self._values.narrow(2, 0, self.length)

    def arguments(self, mask: Tensor | None) -> Tail:
        """The buffers as ops take them; `mask` [B, 1, T, M]."""
        return Tail(self.keys, self.values, mask, None if self.cursor is None else self.cursor[:1])

    def ragged(self, begin: int) -> Ragged:
        """Slots from `begin` on as rows of a pool."""
        keys, values = (part.reshape(-1, part.shape[-1]) for part in (self._keys, self._values))
        rows, new = self._keys.shape[0] * self._keys.shape[1], self.length - begin
        offset = torch.arange(rows, device=keys.device) * self.capacity + begin
        return Ragged(keys, values, offset, torch.full_like(offset, new), new)

    def fork(self) -> "DecodeBuffer":
        """An independent buffer."""
        self._writable = False
        return copy.copy(self)

    def rows(self, batch: Tensor) -> "DecodeBuffer":
        """The buffer of batch rows `batch` [B']."""
        batch = batch.to(self._keys.device)
        chosen = DecodeBuffer(self._keys[batch], self._values[batch], self.length, writable=not torch.is_grad_enabled())
        chosen.visible = None if self.visible is None else self.visible[batch]
        return chosen

    def crop(self, length: int) -> None:
        """Drop all but the first `length` entries."""
        self.length = length
        self.visible = None if self.visible is None else self.visible[:, :length]

    def tensors(self) -> list[Tensor]:
        """Both buffers, allocated capacity included."""
        return [self._keys, self._values]


def rows_of(parts: tuple[Tensor, Tensor] | None, rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows `rows` [B'] of both tensors."""
    return None if parts is None else (parts[0][rows.to(parts[0].device)], parts[1][rows.to(parts[1].device)])
