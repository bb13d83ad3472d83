"""The cache decides: a transformers cache that owns what is retained of a prompt."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from learnkv.cache.eviction import Rerotate, compact
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.schedule import EvictionSchedule
from learnkv.cache.storage import DecodeBuffer
from learnkv.core.adapter import Adapter
from learnkv.core.observation import CaptureSpec, PromptPass
from learnkv.errors import UserError
from learnkv.ops.device import upload


class CompressedCache(Cache):
    """An ordinary `past_key_values` that retains, per layer and kv head, only what a policy kept of the prompt.

    While the prompt is read nothing is evicted. `seal` ends the prompt, `evict` keeps a part of it;
    tokens read afterwards are appended to tails. Sliding-window layers of a hybrid model stay transformers' own.
    """

    def __init__(self, config: PretrainedConfig, capture_spec: CaptureSpec | None = None) -> None:
        layers = DynamicCache(config=config).layers
        text = config.get_text_config(decoder=True)
        hybrid = len(set(getattr(text, "layer_types", None) or ())) > 1
        own = [not (hybrid and getattr(layer, "is_sliding", False)) for layer in layers]
        self.compressible = [index for index, mine in enumerate(own) if mine]
        for at, index in enumerate(self.compressible):
            layers[index] = CompressedLayer(at, capture_spec or CaptureSpec())
        super().__init__(layers=layers)
        self.prompt_lengths: list[int] = []
        self.tail_mask: Tensor | None = None
        self.tail_padded = False
        self.pending: tuple[Tensor, Tensor] | None = None
        self.budgets: Tensor | None = None
        self.covered: list[int] = []
        self.schedule: EvictionSchedule | None = (
            None  # how it stays within its budget while tokens are added; None: it grows
        )
        self.extra_pass_tokens: dict[PromptPass, list[int]] = {}  # tokens of each row that were read in extra passes
        self.adapter: Adapter | None = None  # acts on the tokens that are read from now on
        self.steps: object = None
        """Decode steps of the last turn, captured as a graph, for as long as rows and tails stay where they are."""

    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that a policy decides about, in order."""
        return [self.layers[index] for index in self.compressible]

    @property
    def sealed(self) -> bool:
        """True once the prompt is complete."""
        return all(layer.sealed for layer in self.compressed_layers())

    def set_prompt(self, lengths: Sequence[int]) -> None:
        """Remember how many tokens each row of the prompt has; what precedes them is padding."""
        self.prompt_lengths = list(lengths)

    @property
    def prompt_mask(self) -> Tensor:
        """[B, S] True where a slot of the prompt is a token."""
        slots = self.layers[self.compressible[0]].prompt
        return torch.arange(slots) >= slots - torch.tensor(self.prompt_lengths).unsqueeze(-1)

    def seal(self) -> None:
        """End the prompt. What is read from now on goes to the tails; nothing is copied or freed."""
        if self.sealed:
            return
        first = self.compressed_layers()[0]
        if first.keys is None:
            raise UserError("the cache is empty: read a prompt first")
        if not self.prompt_lengths:
            valid = first.slot_positions() >= 0
            if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
                raise UserError("the prompt is padded on the right: expected left padding")
            self.set_prompt(valid.sum(-1).tolist())
        for layer in self.compressed_layers():
            layer.seal()

    def evict(
        self, scores: Tensor, budgets: Tensor, total: int, first: int = 0, rerotate: Rerotate | None = None
    ) -> None:
        """Keep the `budgets[l, b, h]` highest-scored entries of every head of layers first, first + 1, …

        Args:
            scores: [L, B, H, S] float32, +inf protected, -inf no entry.
            budgets, total: [L, B, H] int64, and their sum.
            first: index of the first of these layers among the compressible ones.
            rerotate: consecutive positions for what is kept, from the `start` or up to the `end`; None: their own.
        """
        layers = self.compressed_layers()[first : first + scores.shape[0]]
        live = None if self.schedule is None else self.schedule.capture_spec
        for at, segment in compact(layers, scores, budgets, total, live, rerotate):
            layers[at].evict(segment, live)

    def evict_if_due(self) -> None:
        """Let the policy that keeps the cache within its budget evict again, once the tail is as long as was agreed."""
        if self.schedule is not None and self.tail_length >= self.schedule.evict_interval and self.sealed:
            self.schedule.evict(self)

    def fork(self) -> "CompressedCache":
        """A cache of its own that shares storage with this one; only tables and tails are copied."""
        twin = copy.copy(self)
        twin.steps = None
        twin.layers = [
            layer.fork() if index in self.compressible else copy.copy(layer) for index, layer in enumerate(self.layers)
        ]
        return twin

    @property
    def has_sliding_layers(self) -> bool:
        """True for hybrid models, whose sliding layers are transformers' own."""
        return len(self.compressible) < len(self.layers)

    @property
    def tail_length(self) -> int:
        """Slots read after the prompt, or since entries were evicted again."""
        return self.layers[self.compressible[0]].tail_length

    @property
    def continuation_length(self) -> int:
        """Slots read after the prompt."""
        return self.layers[self.compressible[0]].merged_tokens + self.tail_length

    def next_positions(self) -> Tensor:
        """[B] position of the next token of every row."""
        said = self.said().sum(-1)
        return upload(self.prompt_lengths, said.device) + said

    def extend_tail_mask(self, new: Tensor, padded: bool) -> Tensor:
        """Remember which of the next T slots [B, T] are tokens, and whether any is not; returns all said [B, M]."""
        known = 0 if self.tail_mask is None else self.tail_mask.shape[1]
        said = self.said().to(new.device)
        if known < said.shape[1]:  # what transformers' own generate() read
            padded = padded or not bool(said.all())
        self.tail_mask = torch.cat([said, new.bool()], 1)
        self.tail_padded = self.tail_padded or padded
        return self.tail_mask

    def reserve(self, slots: int) -> int:
        """Make room for so many more slots in every tail, as far as they get so long; returns the capacity of all."""
        if self.schedule is not None:
            slots = min(slots, max(self.schedule.evict_interval - self.tail_length, 1))
        return max(tail.reserve(slots) for tail in self.tails())

    def tails(self) -> list[DecodeBuffer]:
        """What was read after the prompt, layer by layer."""
        return [layer.tail for layer in self.compressed_layers() if layer.tail is not None]

    def follow(self, cursor: Tensor | None) -> None:
        """Let `cursor` [2] on the device say how much of the tails is in use and where the next token goes."""
        for tail in self.tails():
            tail.cursor = cursor

    @property
    def forgets(self) -> bool:
        """Whether what was read can be taken back."""
        return self.schedule is None and not self.has_sliding_layers

    @property
    def padded(self) -> bool:
        """Whether tokens to come have to be told of padding: in the tail, or in what sliding layers hold; or who judges
        the tail."""
        prompt = self.layers[self.compressible[0]].prompt
        if self.schedule is not None:
            return True
        return self.tail_padded or (self.has_sliding_layers and min(self.prompt_lengths) < prompt)

    def seen(self, slots: int) -> Tensor:
        """What a new token may see of a tail of so many slots, [B, 1, 1, slots]; in a hybrid model of everything, with
        as many slots ahead. Slots that are not in use yet count as tokens."""
        said = self.said()
        ahead = said.new_ones(said.shape[0], slots - self.tail_length)
        if self.has_sliding_layers:
            return torch.cat([self.prompt_mask.to(said.device), said, ahead], 1)
        return torch.cat([said[:, said.shape[1] - self.tail_length :], ahead], 1)[:, None, None]

    def end_turn(self, begin: int, spoken: Tensor, padded: bool) -> None:
        """Of the slots from `begin` on keep what was said [B, T], True for tokens, and forget the others."""
        for layer in self.compressed_layers():
            assert layer.tail is not None
            layer.tail.crop(begin + spoken.shape[1] - layer.merged_tokens)
            layer.capture.crop(layer.tail.length)
        assert self.tail_mask is not None
        self.tail_mask = torch.cat([self.tail_mask[:, :begin], spoken], 1)
        self.tail_padded = self.tail_padded or padded

    def said(self) -> Tensor:
        """[B, M] which slots after the prompt are tokens, also where transformers' own generate() read them."""
        first = self.compressed_layers()[0]
        device = first.device
        known = torch.ones(first.batch, 0, dtype=torch.bool) if self.tail_mask is None else self.tail_mask
        known = known.to(device)[:, : self.continuation_length]
        new = torch.ones(known.shape[0], self.continuation_length - known.shape[1], dtype=torch.bool, device=device)
        if first.tail is not None and first.tail.seen is not None and new.shape[1]:
            new = first.tail.seen[:, known.shape[1] - first.merged_tokens :]
        return torch.cat([known, new], 1)

    def refuse_gaps(self, seen: Tensor) -> None:
        """Raise where padding within [B, S + M] would count as distance in the sliding layers of a hybrid model."""
        windows = [layer.sliding_window for at, layer in enumerate(self.layers) if at not in self.compressible]
        gap = ~seen[:, 1:] & seen[:, :-1]
        if seen.shape[1] > min(windows) and bool((gap.cumsum(-1).bool() & seen[:, 1:]).any()):
            raise UserError(
                f"padding between the tokens of a row, {seen.shape[1]} slots, and layers that attend to the last "
                f"{min(windows)} slots: continue prompts one by one, or with questions of one length"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of the tail, given as a negative number; the prompt stays."""
        for layer in self.layers:
            if layer.is_sliding and layer.get_seq_length() >= layer.sliding_window:
                raise UserError(f"crop({tokens_to_remove}): the sliding window of {layer.sliding_window} has moved on")
        super().crop(tokens_to_remove)
        self.pending = None

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.prompt_lengths, self.tail_mask, self.pending, self.budgets, self.steps = [], None, None, None, None
        self.covered, self.schedule, self.tail_padded, self.adapter = [], None, False, None

    def activate_past_recording(self) -> None:
        """Asked for by assisted decoding, which would read the prompt again."""
        raise UserError("assisted decoding does not work with a CompressedCache: use learnkv.generate")

    def _select_rows(self, rows: Tensor) -> None:
        self.steps = None
        self.prompt_lengths = [self.prompt_lengths[int(row)] for row in rows] if self.prompt_lengths else []
        if self.tail_mask is not None:
            self.tail_mask = self.tail_mask[rows.to(self.tail_mask.device)]
        if self.pending is not None:
            ids, mask = self.pending
            self.pending = (ids[rows.to(ids.device)], mask[rows.to(mask.device)])
        if self.budgets is not None:
            self.budgets = self.budgets[:, rows.to(self.budgets.device)]
        self.covered = [self.covered[int(row)] for row in rows] if self.covered else []
        self.schedule = None if self.schedule is None else self.schedule.rows(rows)

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

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held for the compressible layers."""
        for layer in self.compressed_layers():
            yield from layer.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of unique storage held: kept entries, positions, tables and the allocated tails."""
        storages = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in self.tensors()}
        return sum(storages.values())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that budgets speak of: the prompt's, and those that have been judged since."""
        return self.covered or self.prompt_lengths

    @property
    def full_nbytes(self) -> int:
        """Bytes of the keys and values of all tokens that budgets speak of, padding not counted."""
        return sum(layer.token_nbytes for layer in self.compressed_layers()) * sum(self.lengths)

    @property
    def spent(self) -> list[float]:
        """Fraction of each row's entries that is retained: of the prompt's, and of those judged since."""
        if self.budgets is None:
            return [1.0] * len(self.prompt_lengths)
        layers, _, heads = self.budgets.shape
        kept = self.budgets.sum((0, 2)).tolist()
        return [one / (n * layers * heads) for one, n in zip(kept, self.lengths, strict=True)]

    @property
    def read(self) -> list[float]:
        """Fraction of each row's prompt entries that a single new token attends to."""
        each = [(one.segment, one.reading) for one in self.compressed_layers() if one.segment is not None]
        if all(reading is None for _, reading in each):
            return self.spent
        counts = [one.length if reading is None else reading.of_prompt(one) for one, reading in each]
        share = torch.stack([count.cpu().view(len(self.lengths), -1) for count in counts]).double().mean((0, 2))
        return (share / torch.tensor(self.lengths)).tolist()

    def kept_positions(self, layer_idx: int, row: int, head: int) -> Tensor:
        """Ascending prompt positions [K] of what one head of model layer `layer_idx` retains."""
        return self.layers[layer_idx].kept_positions(row, head)
