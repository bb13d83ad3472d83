"""Scores from the heads of a layer that retrieve."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.formats import headkv
from learnkv.formats.files import locate
from learnkv.ops.pool_apart import Pooling
from learnkv.ops.window_scores import window_scores


class CompressKV(Scorer):
    """Attention of a layer's semantic retrieval heads, the same for all its kv heads (CompressKV, arXiv 2508.02401).

    score_j = mean over the `first` query heads of the layer with the highest measured scores of
    pool(sum_i A_ij), the sum over the last `window` prompt queries.

    Args:
        heads: file of semantic retrieval scores in HeadKV's format, or `reference`.
        first: number of heads of a layer that are read.
        window: number of last prompt queries.
        kernel_size: neighbouring entries that are pooled, odd.
        pooling: mean or maximum over the neighbours.
    """

    status = "numbers"
    table_argument = "heads"

    def __init__(
        self,
        heads: str = "reference",
        first: int = 4,
        window: int = 8,
        kernel_size: int = 5,
        pooling: Pooling = "avg",
    ) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        if first < 1:
            raise UserError(f"first={first}: expected at least one head")
        self.source, self.first = heads, first
        self.window, self.kernel_size, self.pooling = window, kernel_size, pooling
        measured = headkv.mean_scores(headkv.read(locate(heads, "semantic_heads.json")))
        self.order: Tensor  # [L, H*G], the best head first
        self.register_buffer("order", measured.argsort(dim=-1, descending=True, stable=True), persistent=False)

    def forward(self, obs: Observation) -> Tensor:
        if obs.layer_idx >= self.order.shape[0] or obs.queries.shape[1] != self.order.shape[1]:
            raise UserError(
                f"heads={self.source}: made for {self.order.shape[0]} layers of {self.order.shape[1]} query heads, the "
                f"model has {obs.queries.shape[1]} in layer {obs.layer_idx}; learnkv calibrate only=head_scores "
                "kind=semantic model=MODEL out=FILE makes the file of another model"
            )
        chosen = self.order[obs.layer_idx, : self.first]
        kv_heads = chosen // obs.num_key_value_groups
        scores = window_scores(
            obs.queries[:, chosen, -self.window :],
            obs.keys[:, kv_heads],
            query_positions=obs.query_positions[:, -self.window :],
            positions=obs.positions[:, kv_heads],
            valid=obs.valid[:, kv_heads],
            scaling=obs.scaling,
            terms=obs.terms.of_query_heads(chosen),
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            window_reduce="sum",
        )
        return scores.mean(1, keepdim=True).expand(obs.valid.shape)
