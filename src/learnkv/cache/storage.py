"""Storage of a compressed prompt (one pool, ragged rows) and of what is said after it (tails)."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from learnkv.core.observation import Statistic

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
    start: Tensor
    """[B*H] int64."""
    length: Tensor
    """[B*H] int64."""
    longest: int
    """Upper bound of `length`, known on the host."""
    statistics: Mapping[Statistic, Tensor] = field(default_factory=dict)
    """[N, F] of every entry, what is still gathered."""
    rotated: Tensor | None = None
    """[N] int32 position that every key is rotated to; None: its prompt position."""

    @classmethod
    def whole(cls, keys: Tensor, values: Tensor, positions: Tensor) -> "Segment":
        """A view of a prompt [B, H, S, D], left-padded, whose slots have `positions` [B, S], -1 for padding."""
        batch, heads, slots, dim = keys.shape
        padding = (positions < 0).sum(-1)
        start = torch.arange(batch * heads, device=keys.device) * slots + padding.repeat_interleave(heads)
        each = positions.to(torch.int32).unsqueeze(1).expand(batch, heads, slots).reshape(-1)
        length = (slots - padding).repeat_interleave(heads)
        return cls(keys.view(-1, dim), values.view(-1, dim), each, start, length, slots)

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]] | None:
        """(start, length) of every row, read once; None on a device that the host would have to wait for."""
        if self.start.device.type != "cpu":
            return None
        return list(zip(self.start.tolist(), self.length.tolist(), strict=True))

    def rows(self, batch: Tensor, heads: int) -> "Segment":
        """The segment of batch rows `batch` [B'], sharing the pool."""
        start = self.start.view(-1, heads)[batch.to(self.start.device)].flatten()
        length = self.length.view(-1, heads)[batch.to(self.start.device)].flatten()
        return replace(self, start=start, length=length)

    def padded(self, slots: int) -> tuple[Tensor, Tensor]:
        """Index into the pool [B*H, slots] of every row's entries, at the end of its slots, and where there is one."""
        entry = torch.arange(slots, device=self.start.device) - (slots - self.length).unsqueeze(-1)
        there = entry >= 0
        return (self.start.unsqueeze(-1) + entry).masked_fill(~there, 0), there

    def row_positions(self, row: int) -> Tensor:
        """Ascending prompt positions [length] of one row (host sync)."""
        start = int(self.start[row])
        return self.positions[start : start + int(self.length[row])]

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        always = [self.keys, self.values, self.positions, self.start, self.length, *self.statistics.values()]
        return always if self.rotated is None else [*always, self.rotated]


class DecodeBuffer:
    """Keys and values read after compression: buffers [B, H, capacity, D] that grow by chunks.

    Without gradients new entries are written in place; with gradients the buffers are extended functionally, because
    what was saved for a backward pass must not change. A fork shares the buffers until either tail grows.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int, writable: bool = False) -> None:
        self._keys, self._values, self.length, self._writable = keys, values, length, writable
        self.seen: Tensor | None = None
        """[B, length] slots that the newest token saw; None: all."""
        self.cursor: Tensor | None = None
        """[2] on the device: slots in use and the slot that the next token goes to, while a graph may replay a step;
        keys and values are then the whole buffers."""

    @classmethod
    def empty_like(cls, keys: Tensor, values: Tensor) -> "DecodeBuffer":
        """A tail without capacity for entries shaped like [B, H, T, D]."""
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
            self.reserve(keys.shape[2])
            self._keys[:, :, self.length : end] = keys
            self._values[:, :, self.length : end] = values
        self.length = end

    def reserve(self, slots: int) -> int:
        """Make room for so many more slots, so that adding them allocates nothing; returns the capacity."""
        end = self.length + slots
        if end <= self.capacity and self._writable:
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
    def used(self) -> Tensor | None:
        """[1] slots in use, where a graph counts them on the device."""
        return None if self.cursor is None else self.cursor[:1]

    @property
    def keys(self) -> Tensor:
        """[B, H, length, D]."""
        return self._keys if self.cursor is not None else self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """[B, H, length, D]."""
        return self._values if self.cursor is not None else self._values[:, :, : self.length]

    @property
    def pool(self) -> tuple[Tensor, int]:
        """Keys [B*H*capacity, D], and how far apart the rows begin."""
        return self._keys.reshape(-1, self._keys.shape[-1]), self.capacity

    def fork(self) -> "DecodeBuffer":
        """An independent tail."""
        self._writable = False
        return copy.copy(self)

    def rows(self, batch: Tensor) -> "DecodeBuffer":
        """A tail of batch rows `batch` [B']."""
        at = batch.to(self._keys.device)
        chosen = DecodeBuffer(self._keys[at], self._values[at], self.length, writable=not torch.is_grad_enabled())
        chosen.seen = None if self.seen is None else self.seen[at]
        return chosen

    def crop(self, length: int) -> None:
        """Forget all but the first `length` entries."""
        self.length = length
        self.seen = None if self.seen is None else self.seen[:, :length]

    def tensors(self) -> list[Tensor]:
        """Everything that is held, allocated capacity included."""
        return [self._keys, self._values]
