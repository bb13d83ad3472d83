"""Fast KVzip scores."""

from typing import Literal

from torch import Tensor

from learnkv.core.feature_cache import FeatureKey
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.scorers.gate import gate_scores
from learnkv.scorers.tokenwise import Tokenwise


class FastKVzip(Tokenwise):
    """KVzip's score, predicted by a small trained gate from a token's hidden state (Fast KVzip, arXiv 2601.17668).

    `gate_scores` has the formula. Budgets follow one ranking of all layers and heads: the allocator `Flat`. In the
    published training code the bias b is added twice, once where the gate is used. `GateScorer` trains such a gate.

    Args:
        gate: safetensors file with the gate of every layer, or `reference`.
        bias: how often b is added.
    """

    status = "numbers"
    table_argument = "gate"
    trained = True

    def __init__(self, gate: str = "reference", bias: Literal["once", "twice"] = "once") -> None:
        super().__init__()
        self.source = gate
        self.bias = bias
        self.weights = tensors.read(locate(gate, "kvzip_gate.safetensors"), tensors.KVZIP_GATE)
        self.digest = tensors.digest(self.weights)
        self._caches_features(hidden=True)

    @property
    def feature_key(self) -> FeatureKey:
        return FeatureKey(f"FastKVzip bias={self.bias}", self.digest)

    def forward(self, obs: Observation) -> Tensor:
        return self.cached_features(obs).squeeze(-1)

    def token_features(self, obs: Observation) -> Tensor:
        """The scores themselves, [B, H, S, 1]."""
        assert obs.hidden is not None
        layers, heads, _, _ = self.weights["b"].shape
        expected = (heads, self.weights["q_proj.weight"].shape[-1])
        actual = (obs.keys.shape[1], obs.hidden.shape[-1])
        if obs.layer_idx >= layers or actual != expected:
            raise UserError(
                f"gate={self.source}: made for {layers} layers of {heads} kv heads and hidden size {expected[1]}, "
                f"layer {obs.layer_idx} of the model has {actual[0]} and {actual[1]}; "
                "learnkv calibrate model=MODEL out=FOLDER makes its file"
            )
        weights = {name: weight[obs.layer_idx].to(obs.hidden.device) for name, weight in self.weights.items()}
        if self.bias == "twice":
            weights["b"] = 2 * weights["b"]
        return gate_scores(weights, obs.hidden.float()).unsqueeze(-1)
