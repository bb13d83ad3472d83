"""Layers whose memory is a state of fixed size: linear attention, state spaces and short convolutions."""

import copy
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import LinearAttentionLayer

from learnkv.cache.layer import NOTHING, CompressedLayer
from learnkv.core.observation import CaptureSpec

Packed = dict[str, Tensor]
"""States by name: `conv.0`, `recurrent.0`, … for the first of each kind."""


class StateLayer(LinearAttentionLayer):
    """The states [B, …] of one layer, which no policy compresses.

    They depend on every token that was read and cannot be taken back, so a copy is what a fork and a rewind are made
    of. transformers writes them in place; here an update replaces them, which gradients need.
    """

    is_sliding = False
    is_croppable = False
    conv_states: dict[int, Any]
    recurrent_states: dict[int, Any]

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: object
    ) -> Tensor:
        """Append inputs [B, C, T] of a convolution; returns them after those that it still needs."""
        if not self.is_conv_states_initialized[state_idx]:
            self.conv_kernel_size[state_idx] = conv_kernel_size or conv_states.shape[-1]
            self.dtype, self.device = conv_states.dtype, conv_states.device
        size = self.conv_kernel_size[state_idx]
        if self.has_previous_state[state_idx]:
            inputs = torch.cat([self.conv_states[state_idx], conv_states], -1)
        else:
            inputs = F.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        self.conv_states[state_idx] = inputs[..., -size:].clone()
        self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: object) -> Tensor:
        """Replace a recurrent state [B, …]."""
        state = self.recurrent_states[state_idx] = recurrent_states.clone()
        self.is_recurrent_states_initialized[state_idx] = True
        return state

    def states(self) -> Packed:
        """The states that were written so far."""
        kinds = (("conv", self.conv_states), ("recurrent", self.recurrent_states))
        return {f"{kind}.{i}": part for kind, parts in kinds for i, part in parts.items() if part is not None}

    def take_states(self, other: "StateLayer") -> None:
        """Take over copies of the states of the same layer of another cache."""
        names = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state")
        for name in (*names, "conv_kernel_size"):
            setattr(self, name, dict(getattr(other, name)))
        self.dtype, self.device = other.dtype, other.device
        self.conv_states, self.recurrent_states = (
            {i: None if part is None else part.clone() for i, part in parts.items()}
            for parts in (other.conv_states, other.recurrent_states)
        )

    def restore_states(self, states: Packed) -> None:
        """Hold states as `states` gave them."""
        for name, part in states.items():
            kind, _, number = name.partition(".")
            index = int(number)
            getattr(self, f"{kind}_states")[index] = part.clone()
            getattr(self, f"is_{kind}_states_initialized")[index] = True
            if kind == "conv":
                self.conv_kernel_size[index] = part.shape[-1]
                self.has_previous_state[index] = True
                self.dtype, self.device = part.dtype, part.device

    def select_states(self, rows: Tensor) -> None:
        """Rows [B'] of the batch; a row may be chosen more than once."""
        for parts in (self.conv_states, self.recurrent_states):
            for i, part in parts.items():
                parts[i] = None if part is None else part.index_select(0, rows.to(part.device))

    def fork(self) -> Self:
        """A layer with copies of the states."""
        twin = copy.copy(self)
        twin.take_states(self)
        return twin

    def reset(self) -> None:
        self.__init__(self.number_of_states)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select_states(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next((len(part) for part in self.states().values()), 0)
        self.select_states(torch.arange(rows).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select_states(beam_idx)


class AttentionStateLayer(StateLayer, CompressedLayer):
    """A layer with attention beside a state: its entries are compressed, its state is not.

    Args:
        number_of_states: of each kind.
        layer_idx, capture_spec: as of `CompressedLayer`.
    """

    is_compileable = False

    def __init__(self, number_of_states: int = 1, layer_idx: int = 0, capture_spec: CaptureSpec = NOTHING) -> None:
        CompressedLayer.__init__(self, layer_idx, capture_spec)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        CompressedLayer.lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        return CompressedLayer.get_max_length(self)

    def crop(self, tokens_to_remove: int) -> None:
        CompressedLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        self.__init__(self.number_of_states, self.layer_idx, self.capture.capture_spec)  # type: ignore[misc]

    def fork(self) -> Self:
        twin = CompressedLayer.fork(self)
        assert isinstance(twin, type(self))
        twin.take_states(self)
        return twin

    def batch_select_indices(self, indices: Tensor) -> None:
        CompressedLayer.batch_select_indices(self, indices)
        self.select_states(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        relaxed = self.relaxed  # otherwise rows are selected, states among them
        CompressedLayer.batch_repeat_interleave(self, repeats)
        if relaxed:
            StateLayer.batch_repeat_interleave(self, repeats)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)


def state_layers(layers: list[Any]) -> Iterator[StateLayer]:
    """Those with a state."""
    return (layer for layer in layers if isinstance(layer, StateLayer))
