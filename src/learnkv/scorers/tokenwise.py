"""What scorers make of a token by itself, when it is read."""

import functools
from abc import abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from learnkv.observation import Observation, Recording, Statistic
from learnkv.ops.mix import WORD, mix
from learnkv.scorers.base import Scorer

GRADIENT_TOKENS = 8192
"""Of a prompt, that predictors have gradients of if nothing else is said."""


class Tokenwise(Scorer):
    """A scorer that reads tokens one by one: their hidden states, or the keys and values of all heads at once.

    Hidden states of a whole prompt are larger than its keys and values. So figures are made of every chunk when it is
    read, and they are held instead, with the entries: later, too, when entries are judged again and hidden states are
    gone. Where the scorer is trained, the hidden states of a `sample` of tokens are held beside them, for gradients.
    """

    sample: "HiddenSample"
    """Tokens that figures get their gradients from."""
    _figures: "TokenFigures | None" = None

    @abstractmethod
    def figures(self, seen: Observation) -> Tensor:
        """[B, H, S, F] float32, or [B, 1, S, F] where all heads share them, from each token alone."""

    def _reads_tokens(self, hidden: bool, name: object = None) -> None:
        """Have `figures` gathered.

        Args:
            hidden: whether they read hidden states.
            name: the same for scorers whose figures are the same; none for what is trained.
        """
        self.sample = HiddenSample()
        self._figures = TokenFigures(self, hidden, object() if name is None else name)
        self.statistics = self.statistics | {self._figures}

    @property
    def recording(self) -> Recording:
        hidden = self._figures is not None and self._figures.hidden
        trained = hidden and any(one.requires_grad for one in self.parameters())
        return super().recording | Recording(statistics=frozenset({self.sample} if trained else ()))

    def of_tokens(self, seen: Observation) -> Tensor:
        """`figures` of all entries, as they were when the tokens were read."""
        assert self._figures is not None
        if self._figures not in seen.statistics or (seen.aligned and not self._figures.hidden):
            return self.figures(seen)
        known = seen.statistics[self._figures]
        hidden = seen.statistics.get(self.sample) if seen.aligned else None
        if hidden is None or not torch.is_grad_enabled():
            return known
        total, held = known.shape[2], hidden.shape[1]
        if held == total:
            return self.figures(replace(seen, hidden=hidden))
        slots = self.sample.slots(total).to(known.device)
        made = self.figures(_tokens(seen, slots, hidden))
        # Adds nothing but a gradient, which each token has as often as it must to make up for those that have none.
        return known.index_add(2, slots, (made - made.detach()) * (total / held))


@dataclass(frozen=True)
class TokenFigures(Statistic):
    """The `figures` of every token, [B, H, S, F], or [B, 1, S, F] while all heads hold the same tokens."""

    scorer: Tokenwise = field(compare=False)
    hidden: bool = field()
    name: object = field()

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        new = slice(chunk.keys.shape[2] - chunk.queries.shape[2], None)
        hidden = None if chunk.hidden is None else chunk.hidden[:, -chunk.queries.shape[2] :]
        made = self.scorer.figures(_tokens(chunk, new, hidden))
        if gathered is None:
            return made
        return torch.cat([gathered, made.expand(-1, gathered.shape[1], -1, -1)], 2)


@dataclass(frozen=True)
class HiddenSample(Statistic):
    """Hidden states [B, M, E] of at most so many tokens, the same slots in every row and layer.

    Each slot is as likely to be among them as any other, whatever chunks the prompt is read in.
    """

    tokens: int = GRADIENT_TOKENS
    seed: int = 0

    hidden = True

    def slots(self, total: int) -> Tensor:
        """The slots [M] of a prompt of `total`, ascending."""
        return _drawn(self.tokens, self.seed, total)

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        assert chunk.hidden is not None
        total, new = chunk.keys.shape[2], chunk.hidden[:, -chunk.queries.shape[2] :]
        begin = total - new.shape[1]
        chosen = self.slots(total)
        fresh = new[:, (chosen[chosen >= begin] - begin).to(new.device)]
        if gathered is None:
            return fresh
        still = torch.isin(self.slots(begin), chosen).nonzero()[:, 0].to(new.device)
        return torch.cat([gathered[:, still], fresh], 1)


def draw_sample(policy: nn.Module, tokens: int, seed: int) -> None:
    """Let trained scorers have gradients of so many tokens of each prompt, of others with each seed."""
    for part in policy.modules():
        if isinstance(part, Tokenwise):
            part.sample = HiddenSample(tokens, seed)


def _tokens(seen: Observation, slots: Tensor | slice, hidden: Tensor | None) -> Observation:
    """What is seen of the tokens in these slots [M], whose hidden states are [B, M, E]."""
    entries = {name: getattr(seen, name)[:, :, slots] for name in ("keys", "values", "valid", "positions")}
    return replace(seen, hidden=hidden, statistics={}, **entries)


@functools.lru_cache(maxsize=64)
def _drawn(tokens: int, seed: int, total: int) -> Tensor:
    every = torch.arange(total)
    if total <= tokens:
        return every
    lots = mix(mix(torch.tensor(seed & WORD)) ^ every)  # all different: the lowest of more slots are among these or new
    return lots.topk(tokens, largest=False).indices.sort().values
