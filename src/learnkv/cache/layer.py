"""One layer of a compressed cache: the prompt as it was read, then what was retained of it, and the tail."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from learnkv.cache.capture import Capture
from learnkv.cache.page_index import Reading
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.core.observation import CaptureSpec, Observation
from learnkv.core.page_selector import PageSelector
from learnkv.errors import UserError
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.relaxed_attention import relaxed_attention

NOTHING = CaptureSpec()


class CompressedLayer(CacheLayerMixin):
    """Reads a prompt like an ordinary layer, then is sealed, and evicted or gated; new tokens go to the tail.

    What scorers read beside keys and values is in `recorder`, until eviction.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # only the tail is

    def __init__(self, at: int = 0, capture_spec: CaptureSpec = NOTHING) -> None:
        super().__init__()
        self.at = at
        self.capture = Capture(capture_spec)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None
        self.rotated: Tensor | None = None
        self.frequencies: Tensor | None = None
        self.gates: Tensor | None = None
        self.soft = False
        self.segment: Segment | None = None
        self.tail: DecodeBuffer | None = None
        self.reading: Reading | None = None
        self.when_read: Callable[[], None] | None = None
        self.expects_attention = False
        self.live = False
        self.prompt = 0
        self.merged_tokens = 0
        self.copies = 1
        self.heads = 0
        self.token_nbytes = 0

    # -- transformers' interface -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.heads = key_states.shape[1]
        self.token_nbytes = (key_states[0, :, :1].numel() + value_states[0, :, :1].numel()) * key_states.element_size()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.expects_attention:
            raise UserError("a CompressedCache works with the model that learnkv.attach was called on, not without it")
        self.expects_attention = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.sealed:
            if key_states.shape[0] != self.batch:
                raise UserError(
                    f"{key_states.shape[0]} rows continue {self.batch} prompts: repeat the cache's rows first"
                )
            if self.tail is None:
                self.tail = DecodeBuffer.empty_like(key_states, value_states)
            self.tail.append(key_states, value_states)
            return key_states, value_states
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states, value_states
        else:
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        self.prompt = self.keys.shape[2]
        return self.keys, self.values

    def get_seq_length(self, *args: object) -> int:
        return self.prompt + self.merged_tokens + self.tail_length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers 5.17 hands over positions, later releases a length.
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        if self.sealed:
            return self.tail_length + new, self.prompt + self.merged_tokens
        return self.prompt + new, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.__init__(self.at, self.capture.capture_spec)  # type: ignore[misc]

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
        if self.gates is None:
            self.batch_select_indices(batch)
        else:  # the prompt of a relaxed layer is shared by its continuations
            self._select_continuations(batch)
            self.copies *= repeats
            self.capture = self.capture.rows(batch) if self.live else self.capture

    def _select_continuations(self, indices: Tensor) -> None:
        if self.segment is not None:
            self.segment = self.segment.rows(indices, self.heads)
        for name in ("tail", "reading"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held.rows(indices))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_continuations(indices)
        prompts, self.copies = indices // self.copies, 1
        for name in ("valid", "gates", *(() if self.holds_view else ("keys", "values"))):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[prompts.to(held.device)])
        self.capture = self.capture.rows(prompts)
        if self.holds_view:
            self.keys = self.values = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    # -- phases ------------------------------------------------------------------------------------------------------

    @property
    def sealed(self) -> bool:
        """True once the prompt is complete."""
        return self.segment is not None

    @property
    def holds_view(self) -> bool:
        """True while the segment is a view of the complete prompt."""
        return self.segment is not None and self.keys is not None and self.gates is None

    @property
    def tail_length(self) -> int:
        """Slots of the tail."""
        return 0 if self.tail is None else self.tail.length

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        if self.segment is not None:
            return self.segment.start.shape[0] // self.heads
        return 0 if self.keys is None else self.keys.shape[0]

    def listen(self, capture_spec: CaptureSpec, when_read: Callable[[], None]) -> None:
        """Record the next part of the prompt by itself, and call back when it has been read."""
        self.capture = Capture(capture_spec)
        self.when_read = when_read

    def observe(self, query: Tensor, mask: Tensor | None) -> None:
        """Record what scorers will read and which slots are padding, from the mask attention used.

        A layer that was told to evict `when_read` does so now.
        """
        if mask is not None and mask.dtype != torch.bool:
            raise UserError(f"attention mask of type {mask.dtype}: expected the boolean mask of sdpa")
        # Without padding the mask comes and goes with the length of a chunk; with padding it is always there.
        self.valid = None if mask is None else mask[:, 0, -1].expand(query.shape[0], -1).clone()
        self.capture.observe(query, self.at, *self.whole_prompt(), self.entry_positions())
        if self.when_read is not None:
            self.when_read()
            self.when_read = None

    def kept_positions(self, row: int, head: int) -> Tensor:
        """Ascending prompt positions [K] of what one head retains."""
        if self.segment is None:
            raise UserError("the prompt has not been read to its end")
        return self.segment.row_positions(row * self.heads + head).to(torch.int64)

    def whole_prompt(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, D]; raises UserError once they have been evicted."""
        if self.keys is None or self.values is None:
            raise UserError(
                "the prompt has already been compressed, or its rows repeated or reordered: compress a fork before that"
            )
        return self.keys, self.values

    def slot_positions(self) -> Tensor:
        """Prompt position of each slot, -1 for padding: [B, S] int64."""
        keys, _ = self.whole_prompt()
        shape = (keys.shape[0], keys.shape[2])
        valid = torch.ones(shape, dtype=torch.bool, device=self.device) if self.valid is None else self.valid
        return torch.where(valid, valid.cumsum(-1) - 1, -1)

    def entry_positions(self) -> Tensor:
        """Prompt position of each entry, negative where there is none: [B, H, S] int64."""
        if self.positions is not None:
            return self.positions
        return self.slot_positions().unsqueeze(1).expand(-1, self.heads, -1)

    def stands(self) -> Tensor:
        """Position that each key is rotated to, [B, H, S]."""
        return self.entry_positions() if self.rotated is None else self.rotated

    def rotary_frequencies(self) -> Tensor:
        """Radians per position [F] of the model's RoPE; UserError for a model without it."""
        if self.frequencies is None:
            seen = self.observation()
            if seen.rope is None:
                raise UserError("rerotate: the model does not rotate its keys")
            self.frequencies = seen.rope.frequencies(seen.length)
        return self.frequencies

    def observation(self) -> Observation:
        """What a scorer may see; only while the prompt is complete."""
        return self.capture.observation(self.at, *self.whole_prompt(), self.entry_positions())

    def seal(self) -> None:
        """End the prompt: its entries become rows of a pool without being copied."""
        if self.sealed or self.keys is None or self.values is None:
            return
        self.keys, self.values = self.keys.contiguous(), self.values.contiguous()
        self.segment = Segment.whole(self.keys, self.values, self.slot_positions())

    def evict(self, segment: Segment, live: CaptureSpec | None = None) -> None:
        """Hold `segment` and nothing else of the prompt; of tokens to come record what is `live`."""
        self.segment, self.live = segment, live is not None
        if self.reading is not None:
            self.read_pages(self.reading.selector, self.reading.tokens.tolist())
        self.keys = self.values = self.valid = self.positions = self.rotated = None
        self.capture.forget(live)

    def relax(self, segment: Segment, gates: Tensor, live: CaptureSpec | None = None) -> None:
        """Attend to `segment`, and let every entry's gate [B, H, S] have the gradient of its mask; nothing is freed but
        what was recorded, where something is `live`."""
        self.segment, self.gates, self.soft, self.reading = segment, gates.to(self.device), False, None
        if live is not None:
            self.live = True
            self.capture.forget(live)

    def gate(self, gates: Tensor) -> None:
        """Multiply every entry's softmax weight by its gate, [B, H, S]; nothing is freed."""
        self.gates, self.soft, self.reading = gates, True, None

    def read_pages(self, selector: PageSelector, tokens: Sequence[int]) -> None:
        """Let every single token attend to `tokens` [B] entries per head, in the pages that `selector` chooses."""
        assert self.segment is not None
        self.reading = None if self.at < selector.dense_layers else Reading(selector, tokens, self.segment)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """Attention [B, H*G, T, D] of the newest T tokens to what is retained and to the tail."""
        assert self.tail is not None
        self.tail.seen = None if mask is None else mask[:, 0, -1].expand(query.shape[0], -1)
        if self.live:
            self.capture.hold_back(query)
        held, tail = self.segment, self.tail
        assert held is not None
        kept, recent = (held.keys, held.values, held.start, held.length), (tail.keys, tail.values, mask)
        if self.gates is None:
            read = {} if self.reading is None else self.reading.choose(query, held, tail, mask)
            used = {"tail_length": tail.used, "spans": held.spans, **read}
            return decode_attention(query, *kept, held.longest, *recent, scaling, **used)[0]
        prompt = (*self.whole_prompt(), self.gates)
        if self.soft:
            return gated_attention(query, *prompt, *recent, scaling)
        return relaxed_attention(query, *prompt, *kept, held.longest, *recent, scaling)

    def fork(self) -> "CompressedLayer":
        """A layer that shares storage with this one until either changes."""
        twin = copy.copy(self)
        twin.capture = copy.copy(self.capture)
        if self.tail is not None:
            twin.tail = self.tail.fork()
        if self.reading is not None:
            twin.reading = self.reading.fork()
        return twin

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        held: list[Tensor | None] = [self.keys, self.values, self.valid, self.gates]
        parts = [tensor for tensor in held if tensor is not None] + self.capture.tensors()
        for part in (self.segment, self.tail, self.reading):
            parts += [] if part is None else part.tensors()
        return parts
