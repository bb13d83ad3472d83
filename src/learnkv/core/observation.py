"""What a scorer may read of one layer, and what a prefill captures for scorers."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.hash_bits import WORD, hash_bits
from learnkv.ops.rotary import Rotary
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.ops.window_attention import in_window, window_attention

Embeddings = tuple[Tensor, ...]
"""Rotary embeddings as a model hands them to its layers: cos and sin [B, T, R], or one complex tensor [B, T, F]."""

SAMPLED_TOKENS = 8192
"""Default size of the sample of a prompt's tokens that trained per-token features get gradients from."""


class LayerFunctions(Protocol):
    """What an attention layer computes besides attention, found by applying it to known inputs."""

    def prepare(self, functions: Iterable[str]) -> None:
        """Find these functions now, while the layer's weights are complete; what is not found is refused when used."""

    def rotary(self, embeddings: tuple[Embeddings, ...], keys: Tensor) -> Rotary:
        """The rotation of slots whose embeddings came in these chunks; `keys` [B, H, S, D]. UserError for others."""

    def projection(self) -> Tensor:
        """[E, H*G*D] matrix of the map from the heads' outputs to the layer's; UserError where it is none."""


@dataclass(frozen=True)
class Observation:
    """Keys, values and the last queries of one layer at the moment of planning.

    Letters used everywhere: B batch, H kv heads, G query heads per kv head, S entries (slots) of the prompt, W queries
    of the observation window, D head dimension, E hidden size. Slots are in prompt order, left padding first.
    """

    layer_idx: int
    """Index of the layer among the compressible ones: sliding layers of a hybrid model do not count."""
    queries: Tensor
    """[B, H*G, W, D] queries of the last W prompt slots, after RoPE; W is smaller where the prompt is shorter."""
    query_positions: Tensor
    """[B, W] prompt position of each query, negative where the slot is padding."""
    keys: Tensor
    """[B, H, S, D] after RoPE."""
    values: Tensor
    """[B, H, S, D]."""
    scaling: float
    """Factor on query-key products inside the softmax."""
    valid: Tensor
    """[B, H, S] False where the slot is padding or already evicted."""
    positions: Tensor
    """[B, H, S] prompt position of each entry; padding has negative positions."""
    project: Callable[[], Tensor] | None = None
    """Computes `projection`; None where no layer was probed."""
    hidden: Tensor | None = None
    """[B, S, E] input of the attention block, for a scorer that needs `hidden`."""
    token_ids: Tensor | None = None
    """[B, S] of the prompt, for a scorer that needs `token_ids`."""
    is_image: Tensor | None = None
    """[B, S] True for slots of images and videos; None: all are text."""
    rotation: Callable[[], Rotary] | None = None
    """Computes `rope`; None: nothing is rotated."""
    keep: Tensor | None = None
    """[B] float64, fraction of the row's entries that will be kept; None while the prompt is read."""
    statistics: "Mapping[Statistic | PromptPass, Tensor]" = field(default_factory=dict)
    """Results of the captured `statistics` and `extra_passes`."""
    sample: "HiddenSample | None" = None
    """The sample of tokens whose hidden states are among `statistics`; None where nothing trained was captured."""
    aligned: bool = True
    """Whether a slot is the same token in every head, as in a prompt; False once heads have evicted."""
    terms: SoftmaxTerms = NO_TERMS
    """Soft cap of logits and attention sinks of the model, for whoever computes softmax weights."""

    @property
    def num_key_value_groups(self) -> int:
        """G, query heads per kv head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def window_attention(self, window: int) -> tuple[Tensor, Tensor]:
        """Softmax weights [B, H, G, W, S] of the last `window` queries, and their mask [B, H, W, S]."""
        return window_attention(
            self.queries[:, :, -window:],
            self.keys,
            query_positions=self.query_positions[:, -window:],
            positions=self.positions,
            valid=self.valid,
            scaling=self.scaling,
            terms=self.terms,
        )

    def in_window(self, window: int) -> Tensor:
        """Mask [B, H, S] of the entries that came with the last `window` queries."""
        return in_window(self.query_positions[:, -window:], self.positions)

    @property
    def projection(self) -> Tensor:
        """[E, H*G*D] matrix of the linear map from the heads' outputs to the layer's, whatever weights it is made of.

        Raises:
            UserError: where the layer's output is no such map, or its weights cannot be applied any more (fsdp).
        """
        if self.project is None:
            raise UserError("the policy reads the output projection, and these entries have no layer")
        return self.project()

    @property
    def rope(self) -> Rotary | None:
        """The rotation of every slot as the layer applies it; UserError where it applies anything else."""
        return None if self.rotation is None else self.rotation()

    @property
    def kept(self) -> Tensor:
        """[B] float64, fraction of the row's entries that will be kept; UserError before a budget is known."""
        if self.keep is None:
            raise UserError("these scores depend on how much will be kept: Policy.plan(cache, keep=…).scores has them")
        return self.keep

    @property
    def length(self) -> Tensor:
        """[B] tokens that were read, evicted ones included."""
        return self.positions.masked_fill(~self.valid, -1).amax((1, 2)) + 1

    def of_tokens(self, slots: Tensor | slice, hidden: Tensor | None) -> "Observation":
        """The same for the tokens in `slots` [M] alone, with their hidden states [B, M, E]."""
        entries = {name: getattr(self, name)[:, :, slots] for name in ("keys", "values", "valid", "positions")}
        ids, is_image = (None if part is None else part[:, slots] for part in (self.token_ids, self.is_image))
        return replace(self, hidden=hidden, token_ids=ids, is_image=is_image, statistics={}, **entries)


class Statistic(ABC):
    """A running result over all queries and tokens of the prompt, for scorers that need more than the last queries.

    Hashable; equal ones are captured once for all policies that one prefill serves.
    """

    hidden: bool = False
    """Whether it reads the hidden states of each chunk."""

    @abstractmethod
    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        """The result over everything read so far, as a new tensor [B, …].

        For a scorer that scores entries again during decoding it is per entry: [B, H, S, F], or [B, 1, S, F] where all
        heads share it.

        Args:
            chunk: all entries up to now; its queries are those that were read since `gathered`.
            gathered: the result before these queries, None at first.
        """


class HiddenSample(Statistic):
    """Hidden states [B, M, E] of at most `tokens` tokens, in the model's type; the same slots in every row and layer.

    Each slot is equally likely to be in the sample, whatever chunks the prompt is read in.

    Args:
        tokens: most tokens of a prompt.
        seed: of the draw.
    """

    hidden = True

    def __init__(self, tokens: int = SAMPLED_TOKENS, seed: int = 0) -> None:
        if tokens < 1:
            raise UserError(f"gradient_tokens={tokens}: expected at least 1")
        self.tokens, self.seed = tokens, seed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HiddenSample) and (self.tokens, self.seed) == (other.tokens, other.seed)

    def __hash__(self) -> int:
        return hash((HiddenSample, self.tokens, self.seed))

    def slots(self, total: int) -> Tensor:
        """The sampled slots [M] of a prompt of `total` slots, ascending."""
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


@functools.lru_cache(maxsize=64)
def _drawn(tokens: int, seed: int, total: int) -> tuple[int, ...]:
    if total <= tokens:
        return tuple(range(total))
    # All lots differ, so that the lowest of more slots are among these or new.
    lots = hash_bits(hash_bits(torch.tensor(seed & WORD, device="cpu")) ^ torch.arange(total, device="cpu"))
    return tuple(lots.topk(tokens, largest=False).indices.sort().values.tolist())


@dataclass(frozen=True)
class PassTokens:
    """Tokens that one extra pass reads after the prompt; the cache does not keep them."""

    ids: Tensor
    """[B, R] right-padded."""
    mask: Tensor
    """[B, R] True for tokens."""
    repeated: Tensor
    """[B, R] True for tokens of the prompt that are read once more."""
    begin: Tensor
    """[B] prompt position of the first repeated token."""
    end: Tensor
    """[B] prompt position after the last repeated token."""
    gradient_norms: Tensor | None = None
    """[L, B, R] of how much the last hidden states depend on each layer's output, for a pass with `gradients`."""


class PromptPass(ABC):
    """A value for every entry that is computed in extra passes of the model over the complete prompt.

    A frozen dataclass, so that equal ones are run once.
    """

    hidden: bool = False
    """Whether it reads the hidden states of the pass."""
    gradients: bool = False
    """Whether it reads `gradient_norms`."""

    @abstractmethod
    def passes(self, ids: Tensor, mask: Tensor) -> Iterator[PassTokens]:
        """The passes after prompts [B, S], left-padded where `mask` [B, S] is False."""

    @abstractmethod
    def update(self, obs: Observation, tokens: PassTokens, gathered: Tensor | None) -> Tensor:
        """Values [B, H, S, F] float32 of the prompt's S entries, as a new tensor.

        Args:
            obs: entries of the prompt, then the R of the pass, with queries and hidden states of the pass.
            tokens: the pass.
            gathered: the result after the pass before, None at first.
        """


@dataclass(frozen=True)
class CaptureSpec:
    """What a prefill captures besides keys and values."""

    window: int = 0
    """Number of last queries."""
    hidden: bool = False
    """Inputs of the attention blocks, of the whole prompt."""
    statistics: frozenset[Statistic] = frozenset()
    """Running results over the prompt."""
    extra_passes: frozenset[PromptPass] = frozenset()
    """Results of extra passes."""
    functions: frozenset[str] = frozenset()
    """Functions of the layers that are probed while the prompt is read: `rotation`, `projection`."""
    sample: HiddenSample | None = None
    """Tokens whose hidden states are kept for the gradients of trained scorers; None: no scorer is trained."""
    token_ids: bool = False
    """Ids of the prompt's tokens."""

    @property
    def gathered(self) -> frozenset[Statistic]:
        """Everything that is updated with each chunk: `statistics` and the sample."""
        return self.statistics if self.sample is None else self.statistics | {self.sample}

    @property
    def reads_hidden(self) -> bool:
        """Whether anything needs inputs of the attention blocks."""
        return self.hidden or any(statistic.hidden for statistic in self.gathered)

    def with_sample(self, sample: HiddenSample | None) -> "CaptureSpec":
        """The same with another sample, where anything is trained; None: unchanged."""
        return self if sample is None or self.sample is None else replace(self, sample=sample)

    def __or__(self, other: "CaptureSpec") -> "CaptureSpec":
        """What serves both."""
        assert None in (self.sample, other.sample) or self.sample == other.sample
        return CaptureSpec(
            max(self.window, other.window),
            self.hidden or other.hidden,
            self.statistics | other.statistics,
            self.extra_passes | other.extra_passes,
            self.functions | other.functions,
            self.sample or other.sample,
            self.token_ids or other.token_ids,
        )
