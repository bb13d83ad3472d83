"""A learned correction of a heuristic's scores from single tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.scorers.residual import Residual, unit

Read = Literal["hidden", "keys", "values"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}


class HiddenScorer(Residual):
    """A heuristic's scores plus one small network per layer that reads the token and corrects all kv heads.

    Without a heuristic (base `Constant`) and hidden states as they are (`normalized=False`) this is KVzap's
    predictor (arXiv 2601.07891), of 512 hidden units or none, and Locret's (arXiv 2410.01805), of 1024 with `silu`:
    that one reads queries, keys and values before rotation, which are linear in hidden states unless the model
    normalises them, and its biases are zero. What KVzap evicts is below a threshold, here a budget is kept. The last
    layer starts at zero. SP-KV's utility (arXiv 2605.14037) is the sigmoid of the same network with E / 4 hidden units
    and `silu`; it keeps what has at least a half, whatever number that is, and the model is trained with it, by next
    tokens and log(utility) on logits outside a window of 128. `train.py config=spkv` trains it for a frozen model under
    exact budgets, which the allocator `Threshold` splits by how many tokens of a head have a half.

    Args:
        base: the heuristic; see `Residual`.
        num_layers: layers of the model; 0 until `train.py` fills in this and the other sizes of the model.
        num_heads: kv heads per layer.
        head_dim: D of the model.
        hidden_size: E of the model.
        width: hidden units per layer; 0: none, scores are linear in what is read.
        reads: any of `hidden` (the input of the layer's attention), `keys` and `values` of all heads.
        normalized: scale each of them to mean square 1 first.
        activation: of the hidden units.
    """

    def __init__(
        self,
        base: Scorer,
        num_layers: int = 0,
        num_heads: int = 0,
        head_dim: int = 0,
        hidden_size: int = 0,
        width: int = 32,
        reads: Sequence[Read] = ("hidden",),
        normalized: bool = True,
        activation: Literal["gelu", "silu"] = "gelu",
    ) -> None:
        super().__init__(base, num_layers, num_heads)
        if width < 0 or not reads:
            raise UserError(f"width={width} reads={list(reads)}: expected a width of 0 or more and something to read")
        if activation not in _ACTIVATIONS:
            raise UserError(f"activation={activation}: expected {' or '.join(_ACTIVATIONS)}")
        self.reads, self.normalized, self.activation = tuple(reads), normalized, _ACTIVATIONS[activation]
        self._caches_features(hidden="hidden" in reads)
        sizes: dict[Read, int] = {"hidden": hidden_size, "keys": num_heads * head_dim, "values": num_heads * head_dim}
        features = sum(sizes[source] for source in self.reads)
        first = width or features
        self.weight_in: nn.Parameter | None = None
        if width:
            self.weight_in = nn.Parameter(
                torch.randn(num_layers, features, width, dtype=torch.float32) * max(1, features) ** -0.5
            )
            self.bias = nn.Parameter(torch.zeros(num_layers, 1, width, dtype=torch.float32))
        self.weight_out = nn.Parameter(torch.zeros(num_layers, first, num_heads, dtype=torch.float32))
        self.bias_out = nn.Parameter(torch.zeros(num_layers, 1, num_heads, dtype=torch.float32))

    def correction(self, obs: Observation, baseline: Tensor) -> Tensor:
        return self.cached_features(obs).squeeze(-1)

    def token_features(self, obs: Observation) -> Tensor:
        """The correction itself, [B, H, S, 1]."""
        layer, read = obs.layer_idx, [self._read(obs, source) for source in self.reads]
        inputs = torch.cat([unit(part) if self.normalized else part.float() for part in read], -1)
        if self.weight_in is not None:
            inputs = self.activation(inputs @ self.weight_in[layer] + self.bias[layer])
        return (inputs @ self.weight_out[layer] + self.bias_out[layer]).transpose(1, 2).unsqueeze(-1)

    @staticmethod
    def _read(obs: Observation, source: Read) -> Tensor:
        """The inputs [B, S, …]."""
        if source == "hidden":
            assert obs.hidden is not None
            return obs.hidden
        entries = obs.keys if source == "keys" else obs.values
        # Where a head has evicted the token its slot holds garbage.
        return entries.masked_fill(~obs.valid.unsqueeze(-1), 0.0).transpose(1, 2).flatten(2)
