"""Learned retention of single tokens."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnkv.core.feature_cache import FeatureKey
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.scorers.constant import Constant
from learnkv.scorers.tokenwise import Tokenwise

Read = Literal["hidden", "entries"]


class TrimKV(Tokenwise):
    """How far a token has faded, by a rate read from the token itself (Make Each Token Count, arXiv 2605.09649).

    score_j = (N + 1 - p_j) log beta_j after N tokens, with log beta = logsigmoid(W_2 silu(W_1 x + b_1) + b) for every
    kv head: the token at position p_j keeps a part beta_j of itself with every token that follows, and those that have
    faded most are evicted. Under `Uniform` this is TrimKV, under `Flat` DBTrimKV, whose `floor` is there, and under
    `Threshold` the variant without a budget, which is made exact here. In the published code the latest tokens may be
    protected, and evictions come whenever 128 tokens have been added to a budget of 1,024 (`trimkv_decode`,
    `dbtrimkv_decode`); DBTrimKV then shares the budget anew over all heads, while here heads keep theirs.

    The published gates were trained for models of their authors, with attention to faded entries
    (`retention_attention`); theirs is not public. Two ways to train are here: `learnkv calibrate
    only=retention_gates`, layer by layer by that attention, which writes the file; and `train.py config=trimkv`, end
    to end with exact budgets, where no file is given. The gated network of one variant (`rg3`) is left out.

    Args:
        retention: safetensors file with the gates of every layer (`tensors.RETENTION`), or `reference`; not given: a
            network that is trained.
        num_layers: layers of the model; 0 until `train.py` fills in this and the other sizes of the model.
        num_heads: kv heads per layer.
        head_dim: D of the model.
        hidden_size: E of the model.
        width: hidden units; 512 in the original, 1,024 for Phi-3.
        reads: `hidden`, the input of the layer's attention, or `entries`, keys and values of all heads after RoPE.
        bias: b at first; 10 in the original, which forgets nothing.
        key_norm: whether the logarithm of the key's norm is added to the score.
    """

    status = "numbers"
    table_argument = "retention"
    trained = True

    def __init__(
        self,
        retention: str | None = None,
        num_layers: int = 0,
        num_heads: int = 0,
        head_dim: int = 0,
        hidden_size: int = 0,
        width: int = 512,
        reads: Read = "hidden",
        bias: float = 10.0,
        key_norm: bool = False,
    ) -> None:
        super().__init__()
        if width < 1 or reads not in ("hidden", "entries"):
            raise UserError(f"width={width} reads={reads}: expected 1 or more, and hidden or entries")
        self.source, self.reads, self.key_norm = retention, reads, key_norm
        self.file: dict[str, Tensor] | None = None
        if retention is not None:
            self.file = tensors.read(locate(retention, "retention_gates.safetensors"), tensors.RETENTION)
            self.digest = tensors.digest(self.file)
        else:
            self.base = Constant()
            inputs = hidden_size if reads == "hidden" else 2 * num_heads * head_dim
            first = initial_gate(num_layers, num_heads, inputs, width, bias)
            self.gate = nn.ParameterDict({_parameter(name): nn.Parameter(part) for name, part in first.items()})
        self._caches_features(hidden=reads == "hidden")

    @property
    def feature_key(self) -> FeatureKey:
        return super().feature_key if self.file is None else FeatureKey(f"TrimKV reads={self.reads}", self.digest)

    def forward(self, obs: Observation) -> Tensor:
        age = obs.length.view(-1, 1, 1) + 1 - obs.positions
        scores: Tensor = self.cached_features(obs).squeeze(-1) * age
        if self.key_norm:
            sizes = obs.keys.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0).norm(dim=-1)
            scores = scores + sizes.clamp(min=torch.finfo(sizes.dtype).tiny).log()
        return scores

    def token_features(self, obs: Observation) -> Tensor:
        """Logarithms of beta, [B, H, S, 1]."""
        if self.reads == "hidden":
            assert obs.hidden is not None
            inputs = obs.hidden
        else:
            entries = torch.cat([obs.keys, obs.values], 1).masked_fill(~obs.valid.repeat(1, 2, 1).unsqueeze(-1), 0.0)
            inputs = entries.transpose(1, 2).flatten(2)
        weights = self._weights(obs, inputs.shape[-1])
        return log_retention(weights, inputs.float()).transpose(1, 2).unsqueeze(-1)

    def _weights(self, obs: Observation, inputs: int) -> dict[str, Tensor]:
        """Weights of the layer's network for so many inputs."""
        every = self.file
        if every is None:
            every = {name: self.gate[_parameter(name)] for name in tensors.RETENTION}
        layers, heads, _ = every["out.weight"].shape
        expected, actual = (heads, every["in.weight"].shape[-1]), (obs.keys.shape[1], inputs)
        if obs.layer_idx >= layers or actual != expected:
            raise UserError(
                f"retention={self.source}: made for {layers} layers of {heads} kv heads and {expected[1]} inputs, "
                f"layer {obs.layer_idx} of the model has {actual[0]} and {actual[1]}; "
                "learnkv calibrate model=MODEL out=FOLDER makes its file"
            )
        return {name: part[obs.layer_idx].to(obs.keys.device) for name, part in every.items()}


def _parameter(name: str) -> str:
    return name.replace(".", "_")


def initial_gate(layers: int, heads: int, inputs: int, width: int, bias: float) -> dict[str, Tensor]:
    """Weights of gates [L, …] that give every token the same retention, sigmoid(bias)."""
    return {
        "in.weight": torch.randn(layers, width, inputs, dtype=torch.float32) * max(1, inputs) ** -0.5,
        "in.bias": torch.zeros(layers, width, dtype=torch.float32),
        "out.weight": torch.zeros(layers, heads, width, dtype=torch.float32),
        "out.bias": torch.full((layers, heads), bias, dtype=torch.float32),
    }


def log_retention(weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Logarithms of beta [B, S, H] from inputs [B, S, E] and the weights of one layer; differentiable."""
    hidden = F.silu(F.linear(inputs, weights["in.weight"], weights["in.bias"]))
    return F.logsigmoid(F.linear(hidden, weights["out.weight"], weights["out.bias"]))
