"""Fast KVzip scores."""

from typing import Literal

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.scorers.gate import gate_scores
from learnkv.scorers.tokenwise import Tokenwise


class FastKVzip(Tokenwise):
    """What a small trained gate makes of KVzip's score from a token's hidden state (Fast KVzip, arXiv 2601.17668).

    `gate_scores` has the formula. Budgets follow one ranking of all layers and heads: the allocator `Flat`. In the
    published training code the bias b is added twice, once where the gate is used. `GateScorer` trains such a gate.

    Args:
        gate: safetensors file with the gate of every layer, or `reference`.
        bias: how often b is added.
    """

    table_argument = "gate"
    trained = True

    def __init__(self, gate: str = "reference", bias: Literal["once", "twice"] = "once") -> None:
        super().__init__()
        self.source = gate
        self.bias = bias
        self.weights = tensors.read(locate(gate, "kvzip_gate.safetensors"), tensors.KVZIP_GATE)
        self.digest = tensors.digest(self.weights)
        self._reads_tokens(hidden=True)

    @property
    def identity(self) -> object:
        return (self.digest, self.bias)

    def forward(self, obs: Observation) -> Tensor:
        return self.of_tokens(obs).squeeze(-1)

    def figures(self, obs: Observation) -> Tensor:
        """The scores themselves, [B, H, S, 1]."""
        assert obs.hidden is not None
        layers, heads, _, _ = self.weights["b"].shape
        made_for = (heads, self.weights["q_proj.weight"].shape[-1])
        have = (obs.keys.shape[1], obs.hidden.shape[-1])
        if obs.layer_idx >= layers or have != made_for:
            raise UserError(
                f"gate={self.source}: made for {layers} layers of {heads} kv heads and hidden size {made_for[1]}, "
                f"layer {obs.layer_idx} of the model has {have[0]} and {have[1]}; "
                "learnkv calibrate model=MODEL out=FOLDER makes its file"
            )
        weights = {name: one[obs.layer_idx].to(obs.hidden.device) for name, one in self.weights.items()}
        if self.bias == "twice":
            weights["b"] = 2 * weights["b"]
        return gate_scores(weights, obs.hidden.float()).unsqueeze(-1)
