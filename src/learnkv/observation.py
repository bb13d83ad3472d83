"""What a scorer may see of one layer when the prompt has been read."""

from dataclasses import dataclass

from torch import Tensor

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
