"""The decode loop: one token of every row per step, with buffers at fixed addresses.

No step synchronises with the device: positions, masks and ended rows are tensors that the step itself updates. So a
step can be captured once as a CUDA graph and replayed, where `cuda_graph.refusal` allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.finite import any_invalid
from learnkv.errors import RunError, UserError
from learnkv.inference.cuda_graph import Replay, capture, refusal
from learnkv.inference.sampling import Sampling, check_context, next_token
from learnkv.inference.token_ids import Sequence, refuse_gaps, replace_last_ids
from learnkv.ops.device import upload

CHECK_INTERVAL = 16
"""Steps between two host syncs that check whether all rows have ended and whether the output is NaN."""

WARM_UP = 2
"""Steps before a capture: kernels are compiled and libraries allocate their workspaces."""

WORTH_CAPTURING = 16
"""Steps, done and to come with the same buffers, below which a graph costs more than it saves."""


@dataclass(frozen=True)
class LoopConfig:
    """What the buffers of a loop depend on."""

    model: Any
    sampling: Sampling
    ends: tuple[int, ...]
    pad: int
    batch: int
    capacity: int
    needs_mask: bool
    max_new_tokens: int
    """Columns of the buffers of generated tokens."""


class DecodeLoop:
    """The buffers of one turn, and its steps.

    Args:
        cache: has read the question and has room for the tokens to come.
        config: model, sampling and sizes.
        static: keep the shapes of all steps equal, as a CUDA graph needs it; else tails are read as far as they are
            used.
    """

    def __init__(self, cache: CompressedCache, config: LoopConfig, static: bool) -> None:
        self.config, self.static = config, static
        device = cache.next_positions().device
        batch, columns = config.batch, config.max_new_tokens
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)
        self.live = torch.ones(batch, dtype=torch.bool, device=device)
        self.generated = torch.zeros(batch, columns, dtype=torch.long, device=device)
        self.is_token = torch.zeros(batch, columns, dtype=torch.bool, device=device)
        self.largest = torch.zeros(batch, columns, dtype=torch.float32, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = upload(config.ends, device, torch.long)
        self.cursor = torch.zeros(2, dtype=torch.long, device=device) if static else None
        self.generator = torch.Generator(device) if config.sampling.seeded else None
        self.mask: Tensor | None = None
        self.buffers = _buffers(cache) if static else []
        self.replay: Replay | None = None
        self.total_steps = 0

    def fits(self, cache: CompressedCache, config: LoopConfig) -> bool:
        """Whether these buffers, and a graph of them, can be used for another turn."""
        writable = torch.is_inference_mode_enabled() or not self.token.is_inference()
        same = self.config == config and self.static and writable
        return same and all(a is b for a, b in zip(self.buffers, _buffers(cache), strict=True))

    def run(
        self,
        cache: CompressedCache,
        logits: Tensor,
        new: int,
        stop: Callable[[Tensor], Tensor] | None,
        seed: int | None,
        sequence: Sequence | None = None,
    ) -> Tensor:
        """Generate up to `new` tokens [B, new], the first from logits [B, V] of the question's last token.

        Args:
            sequence: all tokens up to the question's last one, for processors that read them.
        """
        self._begin(cache, new - 1, seed)
        self.sequence, self.chosen = sequence, 0
        try:
            self._choose(logits)
            self._decode(new, stop, CHECK_INTERVAL if cache.can_crop else 1)
            return self._end()
        finally:
            if self.static:
                cache.set_cursor(None)
            del self.cache

    def _decode(self, new: int, stop: Callable[[Tensor], Tensor] | None, check_interval: int) -> None:
        """Generate `new` tokens, or fewer if all rows end."""
        ended: Tensor | None = None
        for step in range(new):
            if stop is not None:
                stopped = stop(self.generated[:, : step + 1].clone())
                self.live.logical_and_(~stopped.to(self.live.device))
                if stopped.device.type == "cpu":
                    ended = stopped if ended is None else ended | stopped
            last = step + 1 == new or (ended is not None and bool(ended.all()))
            if (last or step % check_interval == 0) and (self._all_ended(step) or last):
                return
            self._advance()

    def _begin(self, cache: CompressedCache, steps: int, seed: int | None) -> None:
        """Set the buffers for a turn of so many steps after the tokens that the cache has read."""
        self.cache, self.steps, self.steps_left = cache, 0, steps
        self.first_slot = cache.continuation_length
        self.position.copy_(cache.next_positions().unsqueeze(-1))
        self.live.fill_(True)
        self.generated.fill_(self.config.pad)
        for buffer in (self.is_token, self.count):
            buffer.zero_()
        slots = cache.tail_length + self.config.max_new_tokens if cache.is_hybrid else self.config.capacity
        mask = cache.decode_mask(slots) if self.config.needs_mask else None
        if self.mask is None or mask is None:
            self.mask = mask
        else:
            self.mask.copy_(mask)
        if self.generator is not None and seed is not None:
            self.generator.manual_seed(seed)
        if self.cursor is not None:  # slots in use, and the slot of the next token
            used = cache.tail_length
            self.cursor.copy_(upload([used, used - 1], self.cursor.device))
            cache.set_cursor(self.cursor)

    def _choose(self, logits: Tensor) -> None:
        """Choose the next token of every row from logits [B, V]; rows that have ended get padding."""
        tokens = None
        if self.sequence is not None:
            tokens = torch.cat([self.sequence.ids, self.generated[:, : self.chosen]], 1)
        self.chosen += 1
        token, largest = next_token(logits, self.config.sampling, self.generator, tokens)
        token = torch.where(self.live, token, self.config.pad)
        for buffer, column in ((self.generated, token), (self.is_token, self.live), (self.largest, largest.float())):
            buffer.index_copy_(1, self.count, column.unsqueeze(-1))
        self.count += 1
        self.token.copy_(token.unsqueeze(-1))
        self.live.logical_and_((token.unsqueeze(-1) != self.ends).all(-1))

    def _advance(self) -> None:
        """Read the newest tokens and choose the next ones."""
        check_context(self.config.model, self.cache, self.position, 1 + (self.steps if self.static else 0))
        worth = self.total_steps >= WARM_UP and self.total_steps + self.steps_left >= WORTH_CAPTURING
        if self.static and self.replay is None and worth:
            self.replay = capture(self._step, self.token.device, self.generator)
        if self.replay is None:
            self._step()
        else:
            self.replay()
        self.steps += 1
        self.steps_left -= 1
        self.total_steps += 1

    def _step(self) -> None:
        if self.cursor is not None:
            self.cursor += 1
        logits = self.config.model(
            input_ids=self.token,
            attention_mask=self._attention_mask(),
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.position += self.live.unsqueeze(-1)
        self._choose(logits)

    def _attention_mask(self) -> Tensor | None:
        """Mask of the newest tokens over the tail [B, 1, 1, M], None: all; in a hybrid model [B, S + M]."""
        if self.mask is None or self.static:
            return self.mask
        used = self.cache.tail_length + 1
        if self.cache.is_hybrid:
            used = self.cache.compressed_layers()[0].get_seq_length() + 1
            self.mask[:, used - 1] = self.is_token[:, self.steps]
            refuse_gaps(self.cache, self.mask[:, :used])
        elif self.cache.schedule is not None:  # padding is no candidate for online eviction
            self.mask[..., used - 1] = self.is_token[:, self.steps].view(-1, 1, 1)
        return self.mask[..., :used]

    def _all_ended(self, step: int) -> bool:
        """Whether all rows have ended, after a host sync; raises RunError for NaN in the output."""
        tokens = self.is_token.sum(-1)
        nan = (self.largest.isnan() & self.is_token).any()
        invalid = any_invalid(self.cache.invalid, nan.device)
        facts = torch.stack([self.live.any().long(), nan.long(), invalid.long(), tokens.amax(), tokens.amin()])
        any_live, any_nan, any_bad, self.most, self.fewest = facts.tolist()
        if any_bad:
            self.cache.refuse_invalid()
        self.cache.invalid = ()
        if any_nan:
            raise RunError(f"the model's output is NaN after {step} new tokens")
        return not any_live

    def _end(self) -> Tensor:
        """Drop what was read after the last token of all rows; returns the generated tokens [B, new]."""
        generated, is_token = (buffer[:, : self.most].clone() for buffer in (self.generated, self.is_token))
        self.cache.end_turn(self.first_slot, is_token[:, :-1], self.fewest < self.most - 1)
        replace_last_ids(self.cache, self.first_slot, generated[:, :-1])
        self.cache.pending = (generated[:, -1:], is_token[:, -1:])
        return generated


def _buffers(cache: CompressedCache) -> list[Tensor]:
    """The buffers of all tails."""
    return [buffer for tail in cache.tails() for buffer in tail.tensors()]


def decode_loop_for(
    model: Any,
    cache: CompressedCache,
    new: int,
    sampling: Sampling,
    ends: tuple[int, ...],
    pad: int,
    graph: bool | None,
) -> DecodeLoop:
    """The loop of a turn of `new` tokens: the one of the last turn with its graph, where it fits.

    Raises:
        UserError: for graph=True where the step cannot be captured.
    """
    capacity = cache.reserve(new - 1)
    refused = "graph=False" if graph is False else sampling.refusal
    if refused is None:
        refused = refusal(model, cache, cache.continuation_length + new - 1)
    if graph and refused is not None:
        raise UserError(f"graph=True: {refused}")
    batch, columns = len(cache.prompt_lengths), max(capacity, new)
    config = LoopConfig(model, sampling, ends, pad, batch, capacity, cache.needs_mask, columns)
    previous = cache.decode_loop
    if refused is None and isinstance(previous, DecodeLoop) and previous.fits(cache, config):
        return previous
    loop = DecodeLoop(cache, config, static=refused is None)
    if loop.static:
        cache.decode_loop = loop
    return loop
