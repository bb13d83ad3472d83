"""What scorers make of a token by itself, when it is read."""

import functools
import uuid
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from learnkv.core.observation import CaptureSpec, Observation, Statistic
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.hash_bits import WORD, hash_bits

GRADIENT_TOKENS = 8192
"""Of a prompt, that predictors have gradients of if nothing else is said."""


class Tokenwise(Scorer):
    """A scorer that reads tokens one by one: their hidden states, or the keys and values of all heads at once.

    Hidden states of a whole prompt are larger than its keys and values. So figures are made of every chunk when it is
    read, with the weights of that moment, and they are held instead, with the entries: later, too, when entries are
    judged again and hidden states are gone. Where the scorer is trained, the hidden states of a `sample` of tokens are
    held beside them, for gradients. Once weights have changed, a prompt has to be read again.
    """

    sample: "HiddenSample"
    """Tokens that figures get their gradients from."""
    _of_hidden: bool | None = None

    @abstractmethod
    def figures(self, obs: Observation) -> Tensor:
        """[B, H, S, F] float32, or [B, 1, S, F] where all heads share them, from each token alone."""

    def _reads_tokens(self, hidden: bool) -> None:
        """Have `figures` gathered, which read hidden states or keys and values only."""
        self._of_hidden, self.sample, self._key = hidden, HiddenSample(), uuid.uuid4().hex

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another scorer: its weights may become others."""
        super().__setstate__(state)
        self._key = uuid.uuid4().hex

    @property
    def identity(self) -> object:
        """Equal for scorers that make the same figures."""
        changes = [0 if one.is_inference() else one._version for one in self.parameters()]
        return (self._key, sum(changes))

    @property
    def _figures(self) -> "TokenFigures":
        assert self._of_hidden is not None
        return TokenFigures(self, self._of_hidden, self.identity)

    @property
    def _trained(self) -> bool:
        """Whether figures may have gradients."""
        return any(one.requires_grad for one in self.parameters())

    @property
    def own_capture_spec(self) -> CaptureSpec:
        if not self._of_hidden:
            return super().own_capture_spec
        read: list[Statistic] = [self._figures, self.sample] if self._trained else [self._figures]
        return super().own_capture_spec | CaptureSpec(statistics=frozenset(read))

    @property
    def own_decode_capture(self) -> frozenset[Statistic]:
        return super().own_decode_capture if self._of_hidden is None else super().own_decode_capture | {self._figures}

    def of_tokens(self, obs: Observation) -> Tensor:
        """`figures` of all entries, as they were when the tokens were read."""
        known = obs.statistics.get(self._figures)
        if obs.aligned and (known is None or not self._of_hidden):
            return self.figures(obs)
        if known is None:
            raise UserError(f"{type(self).__name__}: its weights have changed since the prompt was read; read it again")
        if not (obs.aligned and torch.is_grad_enabled() and self._trained):
            return known
        hidden = obs.statistics.get(self.sample)
        if hidden is None:
            raise UserError(
                f"{type(self).__name__}: is trained, and was not when the prompt was read, or with another sample: "
                "read it again"
            )
        slots = self.sample.slots(known.shape[2]).to(known.device)
        made = self.figures(_tokens(obs, slots, hidden))
        # Adds nothing but a gradient, which each token has as often as it must to make up for those that have none.
        gradient = (made - made.detach()) * (known.shape[2] / len(slots))
        return known.detach().index_add(2, slots, gradient.to(known.dtype))


class TokenFigures(Statistic):
    """The `figures` of every token, [B, H, S, F], or [B, 1, S, F] while all heads hold the same tokens.

    Equal to others of the same `identity`. A copy of a cache has the same.
    """

    def __init__(self, scorer: Tokenwise, hidden: bool, identity: object) -> None:
        self.scorer, self.hidden, self.identity = scorer, hidden, identity

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenFigures) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __deepcopy__(self, _: object) -> "TokenFigures":
        return self

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        new = slice(chunk.keys.shape[2] - chunk.queries.shape[2], None)
        hidden = None if chunk.hidden is None else chunk.hidden[:, -chunk.queries.shape[2] :]
        made = self.scorer.figures(_tokens(chunk, new, hidden))
        if gathered is None:
            return made
        return torch.cat([gathered, made.expand(-1, gathered.shape[1], -1, -1)], 2)


class HiddenSample(Statistic):
    """Hidden states [B, M, E] of at most so many tokens, in the model's type; the same slots in every row and layer.

    Each slot is as likely to be among them as any other, whatever chunks the prompt is read in.
    """

    hidden = True
    for_gradients = True

    def __init__(self, tokens: int = GRADIENT_TOKENS, seed: int = 0) -> None:
        if tokens < 1:
            raise UserError(f"gradient_tokens={tokens}: expected at least 1")
        self.tokens, self.seed = tokens, seed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HiddenSample) and (self.tokens, self.seed) == (other.tokens, other.seed)

    def __hash__(self) -> int:
        return hash((HiddenSample, self.tokens, self.seed))

    def slots(self, total: int) -> Tensor:
        """The slots [M] of a prompt of `total`, ascending."""
        return torch.tensor(_drawn(self.tokens, self.seed, total), device="cpu")

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


def _tokens(obs: Observation, slots: Tensor | slice, hidden: Tensor | None) -> Observation:
    """What is seen of the tokens in these slots [M], whose hidden states are [B, M, E]."""
    entries = {name: getattr(obs, name)[:, :, slots] for name in ("keys", "values", "valid", "positions")}
    return replace(obs, hidden=hidden, statistics={}, **entries)


@functools.lru_cache(maxsize=64)
def _drawn(tokens: int, seed: int, total: int) -> tuple[int, ...]:
    if total <= tokens:
        return tuple(range(total))
    # All lots differ, so that the lowest of more slots are among these or new.
    lots = hash_bits(hash_bits(torch.tensor(seed & WORD, device="cpu")) ^ torch.arange(total, device="cpu"))
    return tuple(lots.topk(tokens, largest=False).indices.sort().values.tolist())
