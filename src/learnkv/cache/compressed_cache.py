"""A transformers cache that owns the kept entries of a prompt."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from learnkv.cache.accounting import Accounting
from learnkv.cache.evicted import Evicted, evicted_entries
from learnkv.cache.eviction import Rerotate, compact
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.plain_layers import fork_of, layout
from learnkv.cache.reader import Reader
from learnkv.cache.schedule import EvictionSchedule
from learnkv.cache.state_layer import StateLayer, state_layers
from learnkv.cache.states import Kept
from learnkv.cache.storage import DecodeBuffer, rows_of
from learnkv.cache.tiered_eviction import compact_levels
from learnkv.core.adapter import Adapter
from learnkv.core.finite import Invalid, refuse_invalid
from learnkv.core.images import ImageTokens
from learnkv.core.observation import CaptureSpec, PromptPass
from learnkv.core.precision import LevelPlan
from learnkv.core.protection import Protection
from learnkv.core.residual_store import ResidualStore
from learnkv.errors import UserError
from learnkv.ops.device import upload


class CompressedCache(Accounting):
    """A `past_key_values` that holds, per layer and kv head, only the entries of the prompt that a policy keeps.

    While the prompt is read nothing is evicted. `seal` ends the prompt, `evict` keeps a part of it; tokens read
    afterwards are appended to tails. Sliding windows and states of a hybrid model's other layers are carried along.
    """

    def __init__(self, config: PretrainedConfig, capture_spec: CaptureSpec | None = None) -> None:
        layers, self.compressible, self.sliding = layout(config, capture_spec or CaptureSpec())
        super().__init__(layers=layers)
        self.model_name: str = getattr(config, "_name_or_path", "")
        self.read_by = Reader()
        self.protection: Protection | None = None  # spans that every policy keeps
        self.compression: dict[str, Any] | None = None  # policy and budget that it was compressed by; None: complete
        self.tail_mask: Tensor | None = None
        self.tail_padded = False
        self.pending: tuple[Tensor, Tensor] | None = None  # generated ids that were not read, and which are tokens
        self.schedule: EvictionSchedule | None = None  # online eviction; None: the cache grows
        self.extra_pass_tokens: dict[PromptPass, list[int]] = {}  # tokens of each row that were read in extra passes
        self.adapter: Adapter | None = None  # acts on the tokens that are read from now on
        self.token_ids: tuple[Tensor, Tensor] | None = None  # of the prompt's slots and of later ones; None: not known
        self.invalid: tuple[Invalid, ...] = ()  # heads to look at when the host waits for the device next
        self.images: ImageTokens | None = None  # which slots of the prompt are images; None: all are text
        self.rotation: object = None  # of its keys, where RoPE depends on the number of tokens; forks share it
        self.expected_pass: tuple[Tensor, int] | None = None  # positions and a bound that the host knows
        self.decode_loop: object = None  # buffers of the last turn, with their graph, while tails keep their addresses

    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that a policy compresses, in order."""
        return [self.layers[index] for index in self.compressible]

    @property
    def sealed(self) -> bool:
        """True once the prompt is complete."""
        return all(layer.sealed for layer in self.compressed_layers())

    def set_prompt(self, lengths: Sequence[int], ids: Tensor | None = None, images: ImageTokens | None = None) -> None:
        """Set how many tokens each row of the prompt has; what precedes them in `ids` [B, S] is padding."""
        self.prompt_lengths, self.images = list(lengths), images
        if ids is None:
            return
        self.token_ids = (ids, ids[:, :0])
        for layer in self.compressed_layers():
            layer.capture.images = images
            layer.capture.token_ids = ids if layer.capture.capture_spec.token_ids else None

    @property
    def prompt_mask(self) -> Tensor:
        """[B, S] True where a slot of the prompt is a token."""
        slots = self.compressed_layers()[0].prompt_slots
        return torch.arange(slots) >= slots - torch.tensor(self.prompt_lengths).unsqueeze(-1)

    def seal(self) -> None:
        """End the prompt: further tokens go to the tails. Nothing is copied or freed."""
        if self.sealed:
            return
        prompt = self.compressed_layers()[0].prompt
        if not self.prompt_lengths:
            valid = prompt.slot_positions() >= 0
            if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
                raise UserError("the prompt is padded on the right: expected left padding")
            self.set_prompt(valid.sum(-1).tolist())
        for layer in self.compressed_layers():
            layer.seal()

    def evict(
        self,
        scores: Tensor,
        budgets: Tensor,
        total: int,
        first: int = 0,
        rerotate: Rerotate | None = None,
        levels: LevelPlan | None = None,
        residual: ResidualStore | None = None,
    ) -> None:
        """Keep the `budgets[l, b, h]` highest-scored entries of every head of the layers from `first` on.

        Args:
            scores: [L, B, H, S] float32, +inf protected, -inf no entry.
            budgets, total: [L, B, H] int64, and their sum.
            first: index of the first of these layers among the compressible ones.
            rerotate: consecutive positions for kept entries, from the `start` or up to the `end`; None: their own.
            levels: how many entries of these layers are stored at each level; None: all as they are.
            residual: summarises what is evicted; None: it is forgotten.
        """
        layers = self.compressed_layers()[first : first + scores.shape[0]]
        decode_capture = None if self.schedule is None else self.schedule.capture_spec

        def evicted(layer_idx: int) -> Evicted | None:
            if residual is None:
                return None
            gone = evicted_entries(scores[layer_idx], budgets[layer_idx])
            return layers[layer_idx].prompt.evicted_with(residual, gone)

        if levels is None:
            for layer_idx, segment in compact(layers, scores, budgets, total, decode_capture, rerotate):
                layers[layer_idx].evict(Kept(segment, evicted=evicted(layer_idx)), decode_capture)
            return
        self.narrow = True
        tiered = compact_levels(layers, scores, levels, decode_capture, rerotate, self.no_entries)
        for layer_idx, segment, tiers in tiered:
            layers[layer_idx].evict(Kept(segment, tiers=tiers, evicted=evicted(layer_idx)), decode_capture)

    def evict_if_due(self) -> None:
        """Let the policy evict again once the tail has reached the schedule's `evict_interval`."""
        if self.schedule is not None and self.tail_length >= self.schedule.evict_interval and self.sealed:
            self.schedule.evict(self)

    def refuse_invalid(self) -> None:
        """Raise UserError where a policy's scores or budgets were not numbers; a host sync, once after each plan."""
        invalid, self.invalid = self.invalid, ()
        refuse_invalid(invalid)

    def fork(self) -> "CompressedCache":
        """An independent cache that shares storage with this one until either changes."""
        twin = copy.copy(self)
        twin.decode_loop, twin.no_entries = None, {}
        twin.layers = [fork_of(layer) for layer in self.layers]
        return twin

    def state_layers(self) -> list[StateLayer]:
        """The layers with a state, in order."""
        return list(state_layers(self.layers))

    @property
    def is_hybrid(self) -> bool:
        """True where layers keep a sliding window, or a state: nothing that a policy compresses."""
        return bool(self.sliding) or bool(self.state_layers())

    @property
    def tail_length(self) -> int:
        """Slots read after the prompt, or after the last online eviction."""
        return self.compressed_layers()[0].tail_length

    @property
    def continuation_length(self) -> int:
        """Slots read after the prompt."""
        return self.compressed_layers()[0].merged_tokens + self.tail_length

    def next_positions(self) -> Tensor:
        """[B] position of the next token of every row."""
        tokens = self.is_token().sum(-1)
        after = self.prompt_lengths if self.images is None else self.images.positions_after(self.prompt_lengths)
        return upload(after, tokens.device) + tokens

    def extend_tail_mask(self, mask: Tensor, padded: bool) -> Tensor:
        """Record which of the next T slots [B, T] are tokens, and whether any is padding; returns all slots [B, M]."""
        recorded = 0 if self.tail_mask is None else self.tail_mask.shape[1]
        is_token = self.is_token().to(mask.device)
        if recorded < is_token.shape[1]:  # the others were read by transformers' own generate()
            padded = padded or not bool(is_token.all())
        self.tail_mask = torch.cat([is_token, mask.bool()], 1)
        self.tail_padded = self.tail_padded or padded
        return self.tail_mask

    def reserve(self, slots: int) -> int:
        """Allocate `slots` more slots in every tail, up to the next online eviction; returns their capacity."""
        if self.schedule is not None:
            slots = min(slots, max(self.schedule.evict_interval - self.tail_length, 1))
        return max(tail.reserve(slots) for tail in self.tails())

    def tails(self) -> list[DecodeBuffer]:
        """The tails of all layers that have one."""
        return [layer.tail for layer in self.compressed_layers() if layer.tail is not None]

    def set_cursor(self, cursor: Tensor | None) -> None:
        """Let `cursor` [2] on the device hold the slots in use of every tail and the slot of the next token."""
        for tail in self.tails():
            tail.cursor = cursor

    @property
    def can_crop(self) -> bool:
        """Whether the last tokens can be removed."""
        return self.schedule is None and not self.is_hybrid

    @property
    def needs_mask(self) -> bool:
        """Whether new tokens need a mask: for padding in the tail or in a hybrid's layers, or for online eviction."""
        if self.schedule is not None:
            return True
        slots = self.compressed_layers()[0].prompt_slots
        return self.tail_padded or (self.is_hybrid and min(self.prompt_lengths) < slots)

    def decode_mask(self, slots: int) -> Tensor:
        """Mask [B, 1, 1, slots] of a new token over a tail; in a hybrid model [B, S + slots] over everything."""
        is_token = self.is_token()
        unused = is_token.new_ones(is_token.shape[0], slots - self.tail_length)  # count as tokens
        if self.is_hybrid:
            return torch.cat([self.prompt_mask.to(is_token.device), is_token, unused], 1)
        return torch.cat([is_token[:, is_token.shape[1] - self.tail_length :], unused], 1)[:, None, None]

    def end_turn(self, begin: int, is_token: Tensor, padded: bool) -> None:
        """Keep T of the slots from `begin` on, which are tokens where `is_token` [B, T], and drop the others."""
        for layer in self.compressed_layers():
            assert layer.tail is not None
            layer.tail.crop(begin + is_token.shape[1] - layer.merged_tokens)
            layer.capture.crop(layer.tail.length)
        assert self.tail_mask is not None
        self.tail_mask = torch.cat([self.tail_mask[:, :begin], is_token], 1)
        self.tail_padded = self.tail_padded or padded

    def is_token(self) -> Tensor:
        """[B, M] True for the slots after the prompt that are tokens, those read by transformers' generate() too."""
        first = self.compressed_layers()[0]
        mask = torch.ones(first.batch, 0, dtype=torch.bool) if self.tail_mask is None else self.tail_mask
        mask = mask.to(first.device)[:, : self.continuation_length]
        recorded = mask.shape[1]
        new = torch.ones(mask.shape[0], self.continuation_length - recorded, dtype=torch.bool, device=first.device)
        if first.tail is not None and first.tail.visible is not None and new.shape[1]:
            new = first.tail.visible[:, recorded - first.merged_tokens :]
        return torch.cat([mask, new], 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of the tail, given as a negative number; the prompt stays."""
        if self.state_layers():
            raise UserError(f"crop({tokens_to_remove}): states of linear attention cannot be taken back: use a fork")
        for layer in self.layers:
            if layer.is_sliding and layer.get_seq_length() >= layer.sliding_window:
                raise UserError(f"crop({tokens_to_remove}): the sliding window of {layer.sliding_window} has moved on")
        super().crop(tokens_to_remove)
        self.pending = None
        if self.token_ids is not None:
            self.token_ids = (self.token_ids[0], self.token_ids[1][:, : self.continuation_length])

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.prompt_lengths, self.tail_mask, self.pending, self.budgets, self.decode_loop = [], None, None, None, None
        self.covered, self.schedule, self.tail_padded, self.adapter, self.rotation = [], None, False, None, None
        self.token_ids, self.invalid, self.narrow, self.no_entries = None, (), False, {}
        self.compression, self.protection, self.images = None, None, None

    def activate_past_recording(self) -> None:
        """Part of assisted decoding, which would read the prompt again: refused."""
        raise UserError("assisted decoding does not work with a CompressedCache: use learnkv.generate")

    def _select_rows(self, rows: Tensor) -> None:
        self.decode_loop = None
        self.prompt_lengths = [self.prompt_lengths[int(row)] for row in rows] if self.prompt_lengths else []
        self.tail_mask = None if self.tail_mask is None else self.tail_mask[rows.to(self.tail_mask.device)]
        self.pending, self.token_ids = rows_of(self.pending, rows), rows_of(self.token_ids, rows)
        if self.budgets is not None:
            self.budgets = self.budgets[:, rows.to(self.budgets.device)]
        self.covered = [self.covered[int(row)] for row in rows] if self.covered else []
        self.schedule = None if self.schedule is None else self.schedule.rows(rows)
        self.protection = None if self.protection is None else self.protection.rows(rows.tolist())
        self.images = None if self.images is None else self.images.rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies adjacent; the prompt is shared, tails are copied."""
        self._select_rows(torch.arange(len(self.prompt_lengths)).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows `indices` [B'] of the batch."""
        self._select_rows(indices)
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` [B] continue."""
        self._select_rows(beam_idx)
        super().reorder_cache(beam_idx)

    def kept_positions(self, layer_idx: int, row: int, head: int) -> Tensor:
        """Ascending prompt positions [K] of the kept entries of one head of model layer `layer_idx`."""
        self.refuse_invalid()
        return self.compressed_layers()[self.compressible.index(layer_idx)].kept_positions(row, head)
