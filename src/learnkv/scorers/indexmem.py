"""A small trained indexer for every layer."""

import torch
from torch import Tensor

from learnkv.core.feature_cache import FeatureKey
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.ops.index_scores import ACTIVATIONS, Activation, index_keys, index_scores
from learnkv.scorers.tokenwise import Tokenwise


class IndexMem(Tokenwise):
    """The largest score that a trained indexer gives an entry for the last queries (IndexMem, arXiv 2605.25475).

    score_t = max_s sum_i a_si act(q_si k_t), with q_s = norm(U_q Q_s) of all queries of a token before RoPE, in I index
    heads of F channels, one key k_t = norm(U_k x_t) per token, and gates a_s = G x_s / sqrt(I F); x is the input of the
    layer's attention. All heads of a layer keep the same tokens. Source: description; no code is public, and act is not
    stated. I is a quarter of the query heads and F an eighth of D there; the file has any.

    `learnkv calibrate only=indexer` trains it layer by layer, as described: KL of softmax(max_s A) to the softmax of
    the largest product that any query of the window and any head has with the entry, without the first 4 tokens. The
    paper evicts every 128 tokens while it generates, too; here only a prompt is scored, whose rotations are known. Its
    latent memory, one matrix per layer that reads for all heads what was evicted, is not here: `Moments` remembers
    evicted entries without a trained map.

    Args:
        indexer: safetensors file with the indexer of every layer (`tensors.INDEXER`), or `reference`.
        window: last queries.
        activation: of products of queries and keys.
    """

    status = "description"
    table_argument = "indexer"
    trained = True
    needs = frozenset({"rope"})
    functions = frozenset({"rotation"})

    def __init__(self, indexer: str = "reference", window: int = 32, activation: Activation = "relu") -> None:
        super().__init__()
        if window < 1 or activation not in ACTIVATIONS:
            raise UserError(f"window={window} activation={activation}: expected 1 or more, {', '.join(ACTIVATIONS)}")
        self.source, self.window, self.activation = indexer, window, activation
        self.weights = tensors.read(locate(indexer, "indexer.safetensors"), tensors.INDEXER)
        self.digest = tensors.digest(self.weights)
        self._caches_features(hidden=True)

    @property
    def feature_key(self) -> FeatureKey:
        return FeatureKey("IndexMem", self.digest)

    def forward(self, obs: Observation) -> Tensor:
        weights = self._of_layer(obs)
        features, rope = self.cached_features(obs)[:, 0], obs.rope  # [B, S, F + I]
        size = weights["key.weight"].shape[0]
        queries, positions = obs.queries[:, :, -self.window :], obs.query_positions[:, -self.window :]
        gates = features[:, features.shape[1] - queries.shape[2] :, size:]
        plain = queries.float() if rope is None else rope.unrotate(queries)
        real = (positions >= 0)[:, None, :, None]
        scores = index_scores(weights, plain.masked_fill(~real, 0.0), gates, features[..., :size], self.activation)
        visible = (obs.positions[:, 0].unsqueeze(1) <= positions.unsqueeze(2)) & real[:, 0]
        scores = scores.masked_fill(~visible, -torch.inf).amax(1, keepdim=True)  # [B, 1, S]
        return scores.expand(obs.valid.shape)

    def token_features(self, obs: Observation) -> Tensor:
        """Keys and gates, [B, 1, S, F + I]."""
        assert obs.hidden is not None
        return torch.cat(index_keys(self._of_layer(obs), obs.hidden.float()), -1).unsqueeze(1)

    def _of_layer(self, obs: Observation) -> dict[str, Tensor]:
        layers = len(self.weights["key.weight"])
        expected = (self.weights["query.weight"].shape[-1], self.weights["key.weight"].shape[-1])
        width = expected[1] if obs.hidden is None else obs.hidden.shape[-1]
        queries = obs.queries.shape[1] * obs.keys.shape[3]
        if obs.layer_idx >= layers or (queries, width) != expected:
            raise UserError(
                f"indexer={self.source}: made for {layers} layers of {expected[0]} numbers of queries and hidden size "
                f"{expected[1]}, layer {obs.layer_idx} of the model has {queries} and {width}; "
                "learnkv calibrate model=MODEL out=FOLDER makes its file"
            )
        return {name: weight[obs.layer_idx].to(obs.keys.device) for name, weight in self.weights.items()}
