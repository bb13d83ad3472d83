"""One layer of a compressed cache: its state, its decode buffer and what is captured for scorers."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from learnkv.cache.attended import check_attended, check_continues, sizes_of
from learnkv.cache.capture import Capture
from learnkv.cache.entry_index import AnyIndex, index_of
from learnkv.cache.states import Kept, Prompt, Relaxed
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.core.entry_selector import AnySelector
from learnkv.core.observation import CaptureSpec, Observation
from learnkv.errors import UserError
from learnkv.ops.rotary import Layout
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

NOTHING = CaptureSpec()


class CompressedLayer(CacheLayerMixin):
    """Reads a prompt like an ordinary layer, then is sealed, and evicted or relaxed; new tokens go to the tail.

    Args:
        layer_idx: number of the layer among the compressible ones.
        capture_spec: what is captured of the prompt beside keys and values.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # only the tail is

    def __init__(self, layer_idx: int = 0, capture_spec: CaptureSpec = NOTHING) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.state: Prompt | Kept | Relaxed | None = None
        """None before anything was read, and in a layer that was released."""
        self.tail: DecodeBuffer | None = None
        self.capture = Capture(capture_spec)
        self.decode_capture: CaptureSpec | None = None
        """What is captured of the tokens after the prompt."""
        self.when_read: Callable[[], None] | None = None
        self.expects_attention = False
        self.prompt_slots = 0
        self.merged_tokens = 0
        self.heads = 0
        self.token_nbytes = 0
        self.sizes = (0, 0, 0)  # kv heads, channels of keys and of values
        self._rotation: tuple[Tensor, Layout] | None = None
        self._passed: tuple[Tensor, Tensor] | None = None
        self.attended = False
        """Whether attention ran in the current pass of the model."""

    # -- transformers' interface -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.heads, self.sizes = key_states.shape[1], sizes_of(key_states, value_states)
        self.token_nbytes = (key_states[0, :, :1].numel() + value_states[0, :, :1].numel()) * key_states.element_size()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.expects_attention:
            raise UserError("a CompressedCache works with the model that learnkv.attach was called on, not without it")
        self.expects_attention = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.sealed:
            self._append_to_tail(key_states, value_states)
            self._passed = key_states, value_states
            return self._passed
        if self.state is None:
            prompt = Prompt(key_states, value_states)
        else:
            prompt = self.prompt.append(key_states, value_states)
        self.state, self.prompt_slots = prompt, prompt.keys.shape[2]
        self._passed = prompt.keys, prompt.values
        return self._passed

    def confirm(self, module: str, keys: Tensor, values: Tensor) -> None:
        """Record that attention runs on what `update` returned; UserError for a layer that does anything else."""
        passed, self._passed, self.attended = self._passed, None, True
        check_attended(module, passed, keys, values)

    def _append_to_tail(self, keys: Tensor, values: Tensor) -> None:
        check_continues(keys, values, self.batch, self.sizes)
        if self.tail is None:
            self.tail = DecodeBuffer.empty_like(keys, values)
        self.tail.append(keys, values)

    def get_seq_length(self, *args: object) -> int:
        return self.prompt_slots + self.merged_tokens + self.tail_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.17 passes positions, later releases a length.
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        if self.sealed:
            return self.tail_length + new, self.prompt_slots + self.merged_tokens
        return self.prompt_slots + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(self.layer_idx, self.capture.capture_spec)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        keep = self.tail_length - abs(tokens_to_remove)
        if tokens_to_remove > 0 or keep < 0:
            raise UserError(
                f"crop({tokens_to_remove}): only the {self.tail_length} tokens read after compression can be removed, "
                "as a negative number"
            )
        if self.tail is not None:
            self.tail.crop(keep)
            self.capture.crop(keep)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = torch.arange(self.batch).repeat_interleave(repeats)
        if isinstance(self.state, Relaxed):  # its continuations share the prompt
            self.state = self.state.repeat(batch, self.heads, repeats)
            self.tail = None if self.tail is None else self.tail.rows(batch)
            if self.decode_capture is not None:
                self.capture = self.capture.rows(batch)
        else:
            self.batch_select_indices(batch)

    def batch_select_indices(self, indices: Tensor) -> None:
        copies = 1 if self.state is None else self.state.copies
        self.state = None if self.state is None else self.state.rows(indices, self.heads)
        self.tail = None if self.tail is None else self.tail.rows(indices)
        self.capture = self.capture.rows(indices // copies)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def segment(self) -> Segment | None:
        """The entries that attention reads; None while the prompt is read."""
        return None if self.state is None else self.state.segment

    @property
    def sealed(self) -> bool:
        """True once the prompt is complete."""
        return self.segment is not None

    @property
    def relaxed(self) -> bool:
        """True in training, where gates have gradients."""
        return isinstance(self.state, Relaxed)

    @property
    def page_index(self) -> AnyIndex | None:
        """The pages that a single token chooses from; None: it attends to everything."""
        return None if self.state is None else self.state.page_index

    @property
    def prompt(self) -> Prompt:
        """The complete prompt; raises UserError once entries were evicted."""
        if self.state is None:
            raise UserError("the cache is empty: read a prompt first")
        return self.state.complete

    @property
    def tail_length(self) -> int:
        """Slots of the tail."""
        return 0 if self.tail is None else self.tail.length

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        if self.segment is not None:
            return self.segment.offset.shape[0] // self.heads
        return 0 if self.state is None else self.prompt.keys.shape[0]

    def kept_positions(self, row: int, head: int) -> Tensor:
        """Ascending prompt positions [K] of the kept entries of one head."""
        if not isinstance(self.state, Kept | Relaxed):
            raise UserError("the prompt has not been read to its end")
        return self.state.row_positions(row * self.heads + head).to(torch.int64)

    def attended_entries(self) -> Tensor:
        """Kept entries that a single token attends to, per row and head, while the tail is empty."""
        assert isinstance(self.state, Kept | Relaxed)
        return self.state.attended()

    def row_nbytes(self) -> list[int]:
        """Bytes of the kept entries of each row of the batch, with their tables; the tail not counted (host sync)."""
        assert isinstance(self.state, Kept)
        return self.state.row_nbytes(self.heads)

    def listen(self, capture_spec: CaptureSpec, when_read: Callable[[], None]) -> None:
        """Capture the next part of the prompt by itself, and call back when it has been read."""
        self.capture = self.capture.empty(capture_spec)
        self.when_read = when_read

    def release(self) -> None:
        """Drop the prompt and what was captured of it."""
        self.state = None
        self.capture.forget()

    def observe(self, query: Tensor, mask: Tensor | None) -> None:
        """Capture what scorers need and read padding from the mask that attention used; then call `when_read`."""
        # Without padding the mask comes and goes with the length of a chunk; with padding it is always there.
        valid = None if mask is None else mask[:, 0, -1].expand(query.shape[0], -1).clone()
        self.state = prompt = replace(self.prompt, valid=valid)
        self.capture.observe(query, self.layer_idx, prompt.keys, prompt.values, prompt.entry_positions())
        if self.when_read is not None:
            self.when_read()
            self.when_read = None

    def observation(self) -> Observation:
        """What a scorer may use; only while the prompt is complete."""
        prompt = self.prompt
        return self.capture.observation(self.layer_idx, prompt.keys, prompt.values, prompt.entry_positions())

    def rotation(self) -> tuple[Tensor, Layout]:
        """Radians per position [F] of the layer's RoPE, and the pairs of channels that it rotates.

        Raises:
            UserError: for a layer that does anything else to its keys.
        """
        if self._rotation is None:
            obs = self.observation()
            rope = obs.rope
            if rope is None:
                raise UserError("rerotate: these entries have no layer, so how it rotates keys is not known")
            self._rotation = rope.frequencies(obs.length), rope.layout
        return self._rotation

    # -- transitions -------------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """End the prompt: its entries become rows of a pool without being copied."""
        if self.state is not None and not self.sealed:
            self.state = self.prompt.seal()

    def evict(self, kept: Kept, decode_capture: CaptureSpec | None = None) -> None:
        """Hold `kept` and nothing else of the prompt; of tokens to come capture `decode_capture`."""
        pages = None if self.page_index is None else self.page_index.rebuilt(kept.segment)
        self.state = replace(kept, page_index=pages)
        self.decode_capture = decode_capture
        self.capture.forget(decode_capture)

    def relax(self, relaxed: Relaxed, decode_capture: CaptureSpec | None = None) -> None:
        """Train: attend to what is kept; every entry's gate gets the gradient of its mask. Entries stay."""
        self.state = relaxed
        if decode_capture is not None:
            self.decode_capture = decode_capture
            self.capture.forget(decode_capture)

    def gate(self, gates: Tensor) -> None:
        """Train: multiply every entry's softmax weight by its gate, [B, H, S]. Entries stay."""
        assert self.segment is not None
        self.state = self.prompt.relax(self.segment, gates, soft=True)

    def read_pages(self, selector: AnySelector, tokens: Sequence[int], shared: dict[str, Tensor]) -> None:
        """Let every single token attend to `tokens` [B] entries per head, in the pages that `selector` chooses."""
        assert isinstance(self.state, Kept)
        index = index_of(selector, tokens, self.state.segment, self.layer_idx, self.observation, shared)
        self.state = replace(self.state, page_index=index)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, terms: SoftmaxTerms = NO_TERMS) -> Tensor:
        """Attention [B, H*G, T, D] of the newest T tokens to the kept entries and to the tail."""
        assert self.tail is not None
        assert isinstance(self.state, Kept | Relaxed)
        self.tail.visible = None if mask is None else mask[:, 0, -1].expand(query.shape[0], -1)
        if self.decode_capture is not None:
            self.capture.hold_back(query, self.tail.length, self.tail.visible)
        return self.state.attend(query, self.tail, mask, scaling, terms)

    def fork(self) -> "CompressedLayer":
        """A layer that shares storage with this one until either changes."""
        twin = copy.copy(self)
        twin.capture = copy.copy(self.capture)
        twin.state = None if self.state is None else self.state.fork()
        twin.tail = None if self.tail is None else self.tail.fork()
        return twin

    def tensors(self) -> list[Tensor]:
        """All tensors of the layer."""
        parts = self.capture.tensors()
        for part in (self.state, self.tail):
            parts += [] if part is None else part.tensors()
        return parts
