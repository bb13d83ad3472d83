"""Lossless decoding: tokens are drafted with a compressed cache and verified with the full one.

VeriCache (arXiv 2605.17613). One pass of the model over all drafted tokens, with the full cache, decides how many of
them stand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.offload import offload as offload_prompt
from learnkv.cache.shared_tail import check_same_text, check_whole, copy_tail, rewind_sliding, sliding_layers
from learnkv.cache.state_layer import Packed
from learnkv.errors import UserError
from learnkv.inference.generate import last_logits, question_of, read
from learnkv.inference.generation_settings import generation_config, special_tokens
from learnkv.inference.sampling import Sampling, check_numbers, draw, either, processed, sampling_of, stop_condition
from learnkv.inference.speculative_sampling import verified_greedily, verified_samples
from learnkv.inference.token_ids import Sequence, refuse_unknown_ids, replace_last_ids
from learnkv.ops.device import upload

DRAFT_TOKENS = 8


@dataclass(frozen=True)
class LosslessOutput:
    """Generated tokens, and how many drafted tokens stood in every round of drafting and verifying."""

    tokens: Tensor
    """[B, new] as `generate` returns them."""
    drafted: list[int] = field(default_factory=list)
    """Tokens that each round drafted per row."""
    accepted: list[list[int]] = field(default_factory=list)
    """Of each round, drafted tokens that the full cache accepted, for the rows that had not ended."""

    @property
    def accepted_length(self) -> float:
        """Mean of `accepted` over rounds and rows; nan where nothing was drafted."""
        counts = [count for rows in self.accepted for count in rows]
        return sum(counts) / len(counts) if counts else float("nan")


@torch.no_grad()
def generate_lossless(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    draft: CompressedCache,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    draft_tokens: int = DRAFT_TOKENS,
    offload: bool = False,
    do_sample: bool | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
    **settings: Any,
) -> LosslessOutput:
    """Generate what the full cache generates, with most steps on a compressed fork of it.

    Greedy tokens are those of `generate(model, input_ids, cache)` wherever the passes over one token and over several
    choose alike: in float32, wherever the two best logits differ by more than rounding (1e-4). Sampled tokens have the
    full cache's distribution, not the tokens of `generate` with the same seed. Both caches keep what was generated, so
    that a further call with both is the next turn; the draft takes over the keys and values of the verification. In a
    batch a round keeps what all rows have accepted. Memory is that of both caches.

    Args:
        input_ids, attention_mask: [B, T] the question, as for `generate`.
        cache: full, as `prefill` returns it.
        draft: the same prompts, compressed by any policy: `policy.compress(cache.fork(), keep=0.1)`.
        draft_tokens: tokens to draft per round.
        offload: hold the prompt of `cache` in the host's memory from now on, and copy it to the device layer by layer
            in every round. It cannot be compressed after that.
        do_sample, eos_token_id, pad_token_id, stop, tokenizer, seed, settings: as for `generate`; no beam search.

    Raises:
        UserError: for a cache that was compressed, and for a draft of another text.
        RunError: NaN in the model's output.
    """
    chosen = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = generation_config(model, {**settings, **given, "max_new_tokens": max_new_tokens, "do_sample": do_sample})
    if config.num_beams > 1:
        raise UserError(f"num_beams={config.num_beams}: lossless decoding is greedy or samples, expected 1")
    criteria = stop_condition(config, stop, tokenizer)
    _check_caches(cache, draft, draft_tokens)
    begin = cache.continuation_length
    ids, mask, padded, sequence = question_of(model, input_ids, attention_mask, cache, config, criteria)
    if offload:
        offload_prompt(cache)
    sampling = sampling_of(model, config, sequence, ids.device, seeded=config.do_sample and seed is not None)
    ends, pad = special_tokens(config)
    generator = None if not sampling.seeded or seed is None else torch.Generator(ids.device).manual_seed(seed)
    logits = last_logits(model, ids, mask, padded, cache)
    pair = _Pair(model, cache, draft)
    pair.follow(begin)
    stops = either(stop, criteria, sequence)
    return _Loop(pair, sampling, generator, sequence, ends, pad, stops).run(logits, max_new_tokens, draft_tokens)


def _check_caches(cache: CompressedCache, draft: CompressedCache, draft_tokens: int) -> None:
    for name, each in (("cache", cache), ("draft", draft)):
        if not isinstance(each, CompressedCache):
            raise UserError(f"{name}: expected a CompressedCache, as prefill returns it, got {type(each).__name__}")
        each.seal()
    if not isinstance(draft_tokens, int) or draft_tokens < 1:
        raise UserError(f"draft_tokens={draft_tokens}: expected a whole number of tokens, at least 1")
    check_whole(cache)
    check_same_text(cache, draft)
    windows = [cache.layers[index].sliding_window for index in cache.sliding]
    if windows and draft_tokens + 1 >= min(windows):
        raise UserError(f"draft_tokens={draft_tokens}: the sliding window of {min(windows)} tokens is too short for it")
    for layer in draft.compressed_layers():
        if layer.page_index is not None and layer.page_index.selector.remembers:
            raise UserError(f"draft: pages={layer.page_index.selector.name}: remembers tokens, which cannot be removed")
    draft.refuse_invalid()
    draft.pending = None


@dataclass(frozen=True)
class _Pair:
    """The full cache and its draft, which have read the same tokens between rounds."""

    model: Any
    cache: CompressedCache
    draft: CompressedCache

    def follow(self, begin: int) -> None:
        """Let the draft read what the full cache has read from slot `begin` on, counted from the end of the prompt."""
        cache = self.cache
        if self.draft.schedule is None:
            copy_tail(self.draft, cache, begin)
            return
        # Online eviction scores the queries of its own cache.
        refuse_unknown_ids(cache, "a draft that evicts while tokens are added")
        assert cache.token_ids is not None
        is_token = cache.is_token()[:, begin:]
        self.read(self.draft, cache.token_ids[1][:, begin:], is_token, not bool(is_token.all()))

    def drafting(self) -> CompressedCache:
        """The cache to draft with: a fork where drafted tokens could evict entries."""
        if self.draft.schedule is None:
            return self.draft
        fork = self.draft.fork()
        fork.schedule = None
        return fork

    def read(self, cache: CompressedCache, ids: Tensor, is_token: Tensor, padded: bool, last: int = 1) -> Tensor:
        """Logits [B, last, V] of the last of the tokens ids [B, T], 0: of all."""
        logits: Tensor = read(self.model, ids, is_token, padded, cache, logits_to_keep=last).logits
        return logits


class _Loop:
    """Rounds of drafting and verifying: every one commits at least one token of every row."""

    def __init__(
        self,
        pair: _Pair,
        sampling: Sampling,
        generator: torch.Generator | None,
        sequence: Sequence | None,
        ends: tuple[int, ...],
        pad: int,
        stops: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.pair, self.sampling, self.generator, self.sequence = pair, sampling, generator, sequence
        self.pad, self.stops = pad, stops
        device = pair.cache.next_positions().device
        batch = len(pair.cache.prompt_lengths)
        self.ends = upload(ends, device, torch.long)
        self.live = torch.ones(batch, dtype=torch.bool, device=device)
        self.generated = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self.is_token = torch.zeros(batch, 0, dtype=torch.bool, device=device)

    def run(self, logits: Tensor, new: int, draft_tokens: int) -> LosslessOutput:
        """Generate up to `new` tokens, the first from logits [B, V] of the question's last token."""
        check_numbers(logits, 0)
        output = LosslessOutput(self.generated)
        self._commit(self._choose(self._scores(logits, 0)).unsqueeze(-1))
        while self.generated.shape[1] < new and bool(self.live.any()):
            count = min(draft_tokens, new - self.generated.shape[1] - 1)
            live, done = self.live, self.generated.shape[1]
            accepted = self._round(count)
            if count:
                kept = self.is_token[:, done:].sum(-1)
                ended = live & ~self.live  # what was drafted after the end of a row does not count
                counts = torch.where(ended, torch.minimum(accepted, kept), accepted)
                output.drafted.append(count)
                output.accepted.append(counts[live].tolist())
        for cache in (self.pair.cache, self.pair.draft):
            cache.pending = (self.generated[:, -1:], self.is_token[:, -1:])
        return replace(output, tokens=self.generated)

    def _round(self, count: int) -> Tensor:
        """Draft `count` tokens, verify and commit them; returns how many of each row were accepted [B]."""
        cache, begin = self.pair.cache, self.pair.cache.continuation_length
        unread, padded = self.is_token[:, -1:], not bool(self.is_token[:, -1].all())
        drafted, proposals = self._draft(count, unread, padded)
        ids = torch.cat([self.generated[:, -1:], drafted], 1)
        before, states = sliding_layers(cache), [layer.states() for layer in cache.state_layers()]
        logits = self.pair.read(cache, ids, unread.expand(-1, count + 1), padded, last=0)
        check_numbers(logits, self.generated.shape[1])
        scores = torch.stack([self._scores(logits[:, i], i, drafted) for i in range(count + 1)], 1)
        tokens, accepted = self._verified(drafted, proposals, scores)
        committed = self._commit(tokens)
        kept = torch.cat([unread, self.is_token[:, -committed:-1]], 1)
        rewind_sliding(cache, before, count + 1, committed)
        cache.end_turn(begin, kept, not bool(kept.all()))
        replace_last_ids(cache, begin, ids[:, :committed])
        if states and committed <= count:
            self._read_again(begin, ids[:, :committed], kept, before, states)
        self.pair.follow(begin)
        return accepted

    def _read_again(self, begin: int, ids: Tensor, kept: Tensor, windows: list[Any], states: list[Packed]) -> None:
        """Read committed tokens ids [B, n] after slot `begin` from states as they were: those cannot be rewound."""
        cache = self.pair.cache
        for index, window in zip(cache.sliding, windows, strict=True):
            cache.layers[index] = window
        for layer, before in zip(cache.state_layers(), states, strict=True):
            layer.restore_states(before)
        cache.end_turn(begin, kept[:, :0], False)
        replace_last_ids(cache, begin, ids[:, :0])
        self.pair.read(cache, ids, kept, not bool(kept.all()))

    def _draft(self, count: int, unread: Tensor, padded: bool) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, count] of the compressed cache and, where they are sampled, their probabilities [B, count, V]."""
        cache = self.pair.drafting()
        token, drafted = self.generated[:, -1:], self.generated[:, :0]
        proposals: list[Tensor] = []
        for step in range(count):
            logits = self.pair.read(cache, token, unread, padded)[:, -1]
            scores = self._scores(logits, step, drafted)
            if self.sampling.do_sample:
                check_numbers(logits, self.generated.shape[1] + step)
                proposals.append(scores.softmax(-1))
            token = self._choose(scores).unsqueeze(-1)
            drafted = torch.cat([drafted, token], 1)
        return drafted, torch.stack(proposals, 1) if proposals else None

    def _verified(self, drafted: Tensor, proposals: Tensor | None, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, n] that all rows commit, and how many of its drafted ones each row accepts [B].

        Args:
            drafted: [B, count].
            proposals: [B, count, V] probabilities that they were drawn with; None: nothing was drawn.
            scores: [B, count + 1, V] of the full cache.
        """
        if self.sampling.do_sample:
            return verified_samples(drafted, proposals, scores.softmax(-1), self.live, self.generator)
        return verified_greedily(drafted, scores, self.live)

    def _scores(self, logits: Tensor, after: int, drafted: Tensor | None = None) -> Tensor:
        """Processed logits [B, V] of the token after the generated ones and the first `after` drafted."""
        if not self.sampling.do_sample and not self.sampling.processors:
            return logits
        tokens = None
        if self.sequence is not None:
            more = self.generated[:, :0] if drafted is None else drafted[:, :after]
            tokens = torch.cat([self.sequence.ids, self.generated, more], 1)
        return processed(logits, self.sampling, tokens)

    def _choose(self, scores: Tensor) -> Tensor:
        """Tokens [B] of scores [B, V]."""
        return draw(scores.softmax(-1), self.generator) if self.sampling.do_sample else scores.argmax(-1)

    def _commit(self, tokens: Tensor) -> int:
        """Append tokens [B, n] up to the end of every row; returns how many columns have any."""
        columns = 0
        for token in tokens.unbind(1):
            if not bool(self.live.any()):
                break
            columns += 1
            token = torch.where(self.live, token, self.pad)
            self.generated = torch.cat([self.generated, token.unsqueeze(-1)], 1)
            self.is_token = torch.cat([self.is_token, self.live.unsqueeze(-1)], 1)
            self.live = self.live & (token.unsqueeze(-1) != self.ends).all(-1)
            if self.stops is not None:
                self.live = self.live & ~self.stops(self.generated).to(self.live.device)
        return columns
