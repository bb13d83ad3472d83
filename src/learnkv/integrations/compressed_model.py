"""A model whose contexts are compressed before it continues them: likelihoods of given tokens, and generation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.inference.attention import attach
from learnkv.inference.generate import generate
from learnkv.inference.given_tokens import read
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy


@dataclass(frozen=True)
class Request:
    """Tokens whose likelihood is asked for.

    Args:
        ids: all tokens of a text.
        count: its last tokens, whose likelihood is asked for.
        cut: its first tokens, the context, which are compressed before the others are read.
    """

    ids: list[int]
    count: int
    cut: int

    @property
    def context(self) -> list[int]:
        """The tokens that are compressed."""
        return self.ids[: self.cut]

    @property
    def within_context(self) -> int:
        """How many of the `count` tokens are predicted within the context, before it is compressed."""
        return max(0, self.count - (len(self.ids) - 1 - self.cut))


@dataclass
class Usage:
    """What was compressed so far, over all contexts."""

    contexts: int = 0
    contexts_whole: int = 0
    """Contexts that were too short to be compressed."""
    spent: list[float] = field(default_factory=list)
    """Fraction of the entries that is kept, of every compressed context."""
    nbytes: int = 0
    full_nbytes: int = 0

    def add(self, cache: CompressedCache) -> None:
        """Count the rows of a compressed cache."""
        full = cache.row_full_nbytes()
        self.contexts += len(full)
        self.spent += cache.spent
        self.nbytes += sum(full if cache.budgets is None else cache.row_nbytes())
        self.full_nbytes += sum(full)


class CompressedModel:
    """Compresses contexts with a policy to a budget, and continues them.

    Args:
        model: `attach` is called if it was not.
        policy: on the model's device.
        budget: `keep`, `budget` or `bytes`, as of `Policy.compress`.
        whole_below: contexts of fewer tokens are not compressed; those of none never are.

    Raises:
        UserError: a budget that the policy cannot spend.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy, budget: Mapping[str, Any], whole_below: int = 0) -> None:
        self.model: Any = attach(model)
        self.policy, self.budget, self.whole_below = policy, dict(budget), max(whole_below, 1)
        self.policy.check_spend(*(self.budget.get(name) for name in ("keep", "budget", "bytes")))
        self.usage = Usage()

    def compressed(self, contexts: Sequence[Sequence[int]]) -> CompressedCache:
        """The compressed cache of contexts; UserError, with their lengths, where the budget is too small for them."""
        ids, mask = _padded(contexts, "left", self.model.device)
        try:
            cache = prefill(self.model, ids, mask, window=0, policy=self.policy, **self.budget)
        except UserError as error:
            shortest = min(map(len, contexts))
            raise UserError(
                f"contexts of {shortest} tokens and more, whole_below={self.whole_below}: {error}"
            ) from None
        self.usage.add(cache)
        return cache

    @torch.no_grad()
    def logits(self, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """Number of every request, in any order, and the logits [count, V] that predict its last tokens.

        Requests with one context share its prefill. The shortest contexts come first: where the budget is too small for
        them nothing else is computed.

        Args:
            batch_size: contexts that are read at once, and then continuations.
        """
        whole = [number for number, request in enumerate(requests) if request.cut < self.whole_below]
        for numbers in _batches(whole, batch_size):
            rows = self._whole_logits([requests[number].ids[:-1] for number in numbers])
            yield from ((number, row[-requests[number].count :]) for number, row in zip(numbers, rows, strict=True))
        self.usage.contexts_whole += len({tuple(requests[number].context) for number in whole})
        of_context: dict[tuple[int, ...], list[int]] = {}
        for number in sorted({*range(len(requests))}.difference(whole), key=lambda number: requests[number].cut):
            of_context.setdefault(tuple(requests[number].context), []).append(number)
        for contexts in _batches(list(of_context), batch_size):
            yield from self._continued(requests, contexts, [of_context[context] for context in contexts], batch_size)

    def _continued(
        self,
        requests: Sequence[Request],
        contexts: Sequence[Sequence[int]],
        of_context: Sequence[Sequence[int]],
        batch_size: int,
    ) -> Iterator[tuple[int, Tensor]]:
        """Numbers and logits of the requests `of_context` of every context."""
        cache = self.compressed(contexts)
        rows = [(row, number) for row, numbers in enumerate(of_context) for number in numbers]
        for batch in _batches(rows, batch_size):
            fork = cache.fork()
            fork.batch_select_indices(torch.tensor([row for row, _ in batch]))
            after = [requests[number].ids[requests[number].cut : -1] for _, number in batch]
            ids, mask = _padded(after, "right", self.model.device)
            logits = read(self.model, ids, fork, mask)
            for row, (_, number) in enumerate(batch):
                request = requests[number]
                found = logits[row, : len(after[row])]
                if early := request.within_context:
                    (context,) = self._whole_logits([request.context])
                    found = torch.cat([context[-early:], found])
                yield number, found[-request.count :]

    def _whole_logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [T, V] of every row of tokens, read by the model without compression."""
        ids, _ = _padded(rows, "right", self.model.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return [of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)]

    def generated(
        self,
        ids: Tensor,
        mask: Tensor,
        new: int,
        stop: Callable[[Tensor], Tensor],
        settings: Mapping[str, Any],
        whole: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Up to `new` tokens [B, N] after each text; all of its tokens but the last are its context.

        Args:
            ids, mask: [B, S] left-padded.
            stop, settings: as of `generate`.
            whole: [B', N] new tokens for the rows of ids and mask [B', S'] whose context is not compressed.
        """
        lengths = mask.sum(-1).tolist()
        long = [row for row, length in enumerate(lengths) if length - 1 >= self.whole_below]
        short = [row for row in range(len(lengths)) if row not in long]
        parts: dict[int, Tensor] = {}
        if short:
            slots = max(lengths[row] for row in short)
            parts |= zip(short, whole(ids[short, -slots:], mask[short, -slots:]), strict=True)
            self.usage.contexts_whole += len(short)
        if long:
            contexts = [ids[row, ids.shape[1] - lengths[row] : -1].tolist() for row in long]
            cache = self.compressed(contexts)
            tokens = generate(self.model, ids[long, -1:], cache, max_new_tokens=new, stop=stop, **settings)
            parts |= zip(long, tokens, strict=True)
        pad = settings["pad_token_id"]
        return pad_sequence([parts[row] for row in range(len(lengths))], batch_first=True, padding_value=pad)


def _padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and which of them are tokens."""
    tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tokens, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in tokens], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))
