"""Decode steps: one token of every row is read and the next one chosen, with buffers at fixed places.

Nothing in a step waits for the device: where tokens go, what they may see and which rows have ended stand in tensors
that the step itself moves on. So it can be captured once as a CUDA graph and replayed, where `graph.refusal` allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError, UserError
from learnkv.inference.cuda_graph import Replay, capture, refusal
from learnkv.inference.sampling import Sampling, check_context, next_token
from learnkv.ops.device import upload

LOOK_EVERY = 16
"""Steps between two looks at the device: have all rows ended, is the output a number. A look waits for all steps."""

WARM_UP = 2
"""Steps that run before one is captured: kernels are compiled and libraries make their workspaces."""

WORTH_CAPTURING = 16
"""Steps, done and to come with the same buffers, below which a graph costs more than it saves."""


@dataclass(frozen=True)
class Setting:
    """What a step is made for; another setting needs other buffers."""

    model: Any
    sampling: Sampling
    ends: tuple[int, ...]
    pad: int
    batch: int
    capacity: int
    padded: bool
    room: int
    """Tokens that a turn may say."""


class Steps:
    """The buffers of a turn, and its steps.

    Args:
        cache: has read the question and has room for the tokens to come.
        setting: who computes, how tokens are chosen, and the sizes: rows, slots of the tails.
        static: keep the shapes of every step alike, as a graph needs it; else tails are read as far as they are used.
    """

    def __init__(self, cache: CompressedCache, setting: Setting, static: bool) -> None:
        self.setting, self.static = setting, static
        device = cache.next_positions().device
        batch = setting.batch
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)
        self.live = torch.ones(batch, dtype=torch.bool, device=device)
        self.said = torch.zeros(batch, setting.room, dtype=torch.long, device=device)
        self.spoken = torch.zeros(batch, setting.room, dtype=torch.bool, device=device)
        self.largest = torch.zeros(batch, setting.room, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.ends = upload(setting.ends, device, torch.long)
        self.cursor = torch.zeros(2, dtype=torch.long, device=device) if static else None
        self.generator = torch.Generator(device) if setting.sampling.seeded else None
        self.mask: Tensor | None = None
        self.buffers = _buffers(cache) if static else []
        self.replay: Replay | None = None
        self.done = 0

    def serves(self, cache: CompressedCache, setting: Setting) -> bool:
        """Whether these buffers, and a graph of them, can be used for another turn."""
        same = self.setting == setting and self.static
        return same and all(a is b for a, b in zip(self.buffers, _buffers(cache), strict=True))

    def turn(
        self,
        cache: CompressedCache,
        logits: Tensor,
        new: int,
        stop: Callable[[Tensor], Tensor] | None,
        seed: int | None,
    ) -> Tensor:
        """Say up to `new` tokens [B, new], the first of them from logits [B, V] of the question's last token."""
        self._begin(cache, new - 1, seed)
        try:
            self._choose(logits)
            self._run(new, stop, LOOK_EVERY if cache.forgets else 1)
            return self._end()
        finally:
            if self.static:
                cache.follow(None)
            del self.cache

    def _run(self, new: int, stop: Callable[[Tensor], Tensor] | None, every: int) -> None:
        """Say `new` tokens, or as many as it takes until all rows have ended."""
        ended: Tensor | None = None
        for step in range(new):
            if stop is not None:
                answer = stop(self.said[:, : step + 1].clone())
                self.live.logical_and_(~answer.to(self.live.device))
                if answer.device.type == "cpu":
                    ended = answer if ended is None else ended | answer
            last = step + 1 == new or (ended is not None and bool(ended.all()))
            if (last or step % every == 0) and (self._look(step) or last):
                return
            self._advance()

    def _begin(self, cache: CompressedCache, steps: int, seed: int | None) -> None:
        """Start a turn of so many steps behind what the cache has read."""
        self.cache, self.taken, self.ahead = cache, 0, steps
        self.base = cache.continuation_length
        self.position.copy_(cache.next_positions().unsqueeze(-1))
        self.live.fill_(True)
        self.said.fill_(self.setting.pad)
        for buffer in (self.spoken, self.count):
            buffer.zero_()
        slots = cache.tail_length + self.setting.room if cache.has_sliding_layers else self.setting.capacity
        seen = cache.seen(slots) if self.setting.padded else None
        if self.mask is None or seen is None:
            self.mask = seen
        else:
            self.mask.copy_(seen)
        if self.generator is not None and seed is not None:
            self.generator.manual_seed(seed)
        if self.cursor is not None:  # slots in use, and the slot that the next token goes to
            used = cache.tail_length
            self.cursor.copy_(upload([used, used - 1], self.cursor.device))
            cache.follow(self.cursor)

    def _choose(self, logits: Tensor) -> None:
        """Say the next token of every row, from logits [B, V]; a row that has ended says padding."""
        token, largest = next_token(logits, self.setting.sampling, self.generator)
        token = torch.where(self.live, token, self.setting.pad)
        for buffer, column in ((self.said, token), (self.spoken, self.live), (self.largest, largest.float())):
            buffer.index_copy_(1, self.count, column.unsqueeze(-1))
        self.count += 1
        self.token.copy_(token.unsqueeze(-1))
        self.live.logical_and_((token.unsqueeze(-1) != self.ends).all(-1))

    def _advance(self) -> None:
        """Read the tokens said last and say the next ones."""
        check_context(self.setting.model, self.cache, self.position, 1 + (self.taken if self.static else 0))
        worth = self.done >= WARM_UP and self.done + self.ahead >= WORTH_CAPTURING
        if self.static and self.replay is None and worth:
            self.replay = capture(self._step, self.token.device, self.generator)
        if self.replay is None:
            self._step()
        else:
            self.replay()
        self.taken += 1
        self.ahead -= 1
        self.done += 1

    def _step(self) -> None:
        if self.cursor is not None:
            self.cursor += 1
        logits = self.setting.model(
            input_ids=self.token,
            attention_mask=self._seen(),
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]
        self.position += self.live.unsqueeze(-1)
        self._choose(logits)

    def _seen(self) -> Tensor | None:
        """What the tokens may see of the tail [B, 1, 1, M], None: all; in a hybrid model of everything [B, S + M]."""
        if self.mask is None or self.static:
            return self.mask
        used = self.cache.tail_length + 1
        if self.cache.has_sliding_layers:
            used = self.cache.compressed_layers()[0].get_seq_length() + 1
            self.mask[:, used - 1] = self.spoken[:, self.taken]
            self.cache.refuse_gaps(self.mask[:, :used])
        elif self.cache.schedule is not None:  # it has to know what it judges
            self.mask[..., used - 1] = self.spoken[:, self.taken].view(-1, 1, 1)
        return self.mask[..., :used]

    def _look(self, step: int) -> bool:
        """Wait for the device and say whether all rows have ended; raise RunError where an output was NaN."""
        spoken = self.spoken.sum(-1)
        wrong = (self.largest.isnan() & self.spoken).any()
        facts = torch.stack([self.live.any().long(), wrong.long(), spoken.amax(), spoken.amin()])
        going, nan, self.most, self.fewest = facts.tolist()
        if nan:
            raise RunError(f"the model's output is NaN after {step} new tokens")
        return not going

    def _end(self) -> Tensor:
        """Forget what was read beyond the last token that any row said; returns what was said [B, new]."""
        said, spoken = (buffer[:, : self.most].clone() for buffer in (self.said, self.spoken))
        self.cache.end_turn(self.base, spoken[:, :-1], self.fewest < self.most - 1)
        self.cache.pending = (said[:, -1:], spoken[:, -1:])
        return said


def _buffers(cache: CompressedCache) -> list[Tensor]:
    """Where the tails lie."""
    return [held for tail in cache.tails() for held in tail.tensors()]


def steps_for(
    model: Any,
    cache: CompressedCache,
    new: int,
    sampling: Sampling,
    ends: tuple[int, ...],
    pad: int,
    graph: bool | None,
) -> Steps:
    """Steps for a turn of `new` tokens: those of the turn before where they fit, with their graph.

    Raises:
        UserError: for graph=True where the step cannot be captured.
    """
    capacity = cache.reserve(new - 1)
    refused = "graph=False" if graph is False else refusal(model, cache, cache.continuation_length + new - 1)
    if graph and refused is not None:
        raise UserError(f"graph=True: {refused}")
    setting = Setting(model, sampling, ends, pad, len(cache.prompt_lengths), capacity, cache.padded, max(capacity, new))
    if refused is None and isinstance(cache.steps, Steps) and cache.steps.serves(cache, setting):
        return cache.steps
    steps = Steps(cache, setting, static=refused is None)
    if steps.static:
        cache.steps = steps
    return steps
