"""What a scorer may see of one layer, and what can be gathered for it while the prompt is read or in extra passes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.rotary import Rotary
from learnkv.ops.window_attention import in_window, window_attention


@dataclass(frozen=True)
class Observation:
    """Keys, values and the last queries of one layer at the moment of planning.

    Letters used everywhere: B batch, H kv heads, G query heads per kv head, S entries (slots) of the prompt, W queries
    of the observation window, D head dimension, E hidden size. Slots are in prompt order, left padding first.
    """

    layer_idx: int
    """Number of the layer among those that are compressed: in a hybrid model the sliding layers do not count."""
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
    output_weight: Tensor | None = None
    """[E, H*G*D] weight of the output projection, None for a model that does not name it `o_proj`."""
    hidden: Tensor | None = None
    """[B, S, E] input of the attention block, for a scorer that needs `hidden`."""
    rope: Rotary | None = None
    """The rotation of every slot, for scorers that need vectors before RoPE; None for a model without it."""
    keep: Tensor | None = None
    """[B] float64, fraction of the row's entries that will be kept; None while the prompt is read."""
    statistics: "Mapping[Statistic | PromptPass, Tensor]" = field(default_factory=dict)
    """What was gathered for scorers that ask for `statistics` or `extra_passes`."""
    aligned: bool = True
    """Whether a slot is the same token in every head, as in a prompt; not so once heads have evicted."""

    @property
    def num_key_value_groups(self) -> int:
        """G, query heads per kv head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def window_attention(self, window: int) -> tuple[Tensor, Tensor]:
        """Softmax weights [B, H, G, W, S] of the last `window` queries, and which of them sees what [B, H, W, S]."""
        return window_attention(
            self.queries[:, :, -window:],
            self.keys,
            query_positions=self.query_positions[:, -window:],
            positions=self.positions,
            valid=self.valid,
            scaling=self.scaling,
        )

    def in_window(self, window: int) -> Tensor:
        """Which entries [B, H, S] came with the last `window` queries."""
        return in_window(self.query_positions[:, -window:], self.positions)

    @property
    def projection(self) -> Tensor:
        """[E, H*G*D] weight of the output projection; UserError for a model that does not show it."""
        if self.output_weight is None:
            raise UserError(
                "the policy reads the weight of the output projection, and the model shows none: it has no `o_proj`, "
                "or one that is quantised, offloaded or shared out to several processes (fsdp)"
            )
        return self.output_weight

    @property
    def kept(self) -> Tensor:
        """[B] float64, fraction of the row's entries that will be kept; known from the moment of planning on."""
        if self.keep is None:
            raise UserError("these scores depend on how much will be kept: Policy.plan(cache, keep=…).scores has them")
        return self.keep

    @property
    def length(self) -> Tensor:
        """[B] tokens that were read, evicted ones included."""
        return self.positions.masked_fill(~self.valid, -1).amax((1, 2)) + 1


class Statistic(ABC):
    """What is gathered of all queries while the prompt is read, for scorers that want more than the last ones.

    Hashable; those that are equal are gathered once for all policies that one prefill serves.
    """

    hidden: bool = False
    """Whether it reads the hidden states of each chunk."""
    for_gradients: bool = False
    """Whether scores are the same without it."""

    @abstractmethod
    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        """The statistic of all that has been read, in a tensor [B, …] of its own; [B, H, S, F], or [B, 1, S, F] where
        all heads share it, for a scorer that judges entries again later.

        Args:
            chunk: all entries up to now; its queries are those that were read since `gathered`.
            gathered: the statistic up to these queries, None at first.
        """


@dataclass(frozen=True)
class PassTokens:
    """Tokens that are read after the prompt, and forgotten again."""

    ids: Tensor
    """[B, R] right-padded."""
    mask: Tensor
    """[B, R] True for tokens."""
    repeats: Tensor
    """[B, R] True for tokens of the prompt that are read once more."""
    begin: Tensor
    """[B] prompt position of the first token that is read once more."""
    end: Tensor
    """[B] prompt position after the last."""


class PromptPass(ABC):
    """A figure of every entry that extra passes of the model over the complete prompt tell.

    A frozen dataclass, so that equal ones are run once.
    """

    hidden: bool = False
    """Whether it reads the hidden states of the pass."""

    @abstractmethod
    def passes(self, ids: Tensor, mask: Tensor) -> Iterator[PassTokens]:
        """What to read after prompts [B, S], left-padded where `mask` [B, S] is False."""

    @abstractmethod
    def update(self, obs: Observation, told: PassTokens, gathered: Tensor | None) -> Tensor:
        """The figure [B, H, S, F] float32 of the prompt's S entries, in a tensor of its own.

        Args:
            seen: entries of the prompt, then the R of the pass, with queries and hidden states of the pass.
            told: the pass.
            gathered: the result after the pass before, None at first.
        """


@dataclass(frozen=True)
class CaptureSpec:
    """What a prefill has to record beside keys and values."""

    window: int = 0
    """Last queries."""
    hidden: bool = False
    """Inputs of the attention blocks, of the whole prompt."""
    statistics: frozenset[Statistic] = frozenset()
    """What is gathered of all queries."""
    extra_passes: frozenset[PromptPass] = frozenset()
    """What extra passes tell."""

    @property
    def reads_hidden(self) -> bool:
        """Whether anything asks for inputs of the attention blocks."""
        return self.hidden or any(one.hidden for one in self.statistics)

    def __or__(self, other: "CaptureSpec") -> "CaptureSpec":
        """What serves both."""
        return CaptureSpec(
            max(self.window, other.window),
            self.hidden or other.hidden,
            self.statistics | other.statistics,
            self.extra_passes | other.extra_passes,
        )
