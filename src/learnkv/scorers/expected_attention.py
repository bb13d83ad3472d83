"""ExpectedAttention scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.ops.softmax_terms import softmax
from learnkv.scorers.query_moments import QueryMoments


class ExpectedAttention(Scorer):
    """Attention that queries still to come are expected to give (ExpectedAttention, arXiv 2510.00636).

    Queries are taken for normal, with the mean and covariance that the prompt's own have before rotation, and turned by
    the mean rotation R of the next `future` positions: with m = R mean and C = R covariance R^T,
    z_j = m k_j / sqrt(D) + k_j C k_j / 2D. score_j = (mean over the query heads of a kv head of softmax_j(z) + epsilon)
    * |v_j|_2. The first `sinks` entries take no part and come before all others; recent ones are not favoured.

    In kvpress the mean is over all prompt queries but the first four, and epsilon is 0; its evaluations use 0.01 under
    AdaKV, and no value norm under CriticalKV, which has one of its own. A softmax with learned attention sinks has them
    here, too. Of soft-capped logits exp has no expectation in closed form: only the mean query can be scored with.

    Args:
        future: number of positions after the prompt whose rotations are averaged.
        sinks: first entries that are left out.
        covariance: whether the covariance counts, or the mean alone.
        value_norm: whether scores are multiplied by the norm of the value.
        epsilon: added to the expected attention before that, and only then.
        moments: safetensors file with the moments of a model's queries, or `reference`; not given: those of the prompt.
    """

    status = "numbers"
    table_argument = "moments"
    needs = frozenset({"rope"})
    functions = frozenset({"rotation"})

    def __init__(
        self,
        future: int = 512,
        sinks: int = 4,
        covariance: bool = True,
        value_norm: bool = True,
        epsilon: float = 0.0,
        moments: str | None = None,
    ) -> None:
        super().__init__()
        if future < 1 or sinks < 0 or epsilon < 0:
            raise UserError(f"future={future} sinks={sinks} epsilon={epsilon}: expected future >= 1, the others >= 0")
        self.future = future
        self.sinks = sinks
        self.covariance = covariance
        self.value_norm = value_norm
        self.epsilon = epsilon
        self.source = moments
        self.measured: dict[str, Tensor] | None = None
        if moments is None:
            self.statistics = frozenset({QueryMoments(sinks)})
        else:
            self.measured = tensors.read(locate(moments, "query_moments.safetensors"), tensors.MOMENTS)

    def forward(self, obs: Observation) -> Tensor:
        if self.covariance and obs.terms.softcap is not None:
            raise UserError(
                "ExpectedAttention: the expectation over queries has no closed form with soft-capped logits, expected "
                "covariance=false"
            )
        mean, covariance = self.future_queries(obs)
        heads = obs.keys.shape[1]
        keys = obs.keys.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0)
        logits = obs.scaling * torch.einsum("bhgd,bhsd->bhgs", mean.unflatten(1, (heads, -1)), keys)
        if self.covariance:
            spread = covariance.unflatten(1, (heads, -1))
            for member in range(spread.shape[2]):  # a member at a time: [B, H, S, D] is as large as the keys
                turned = keys @ spread[:, :, member]
                logits[:, :, member] += obs.scaling**2 / 2 * (turned * keys).sum(-1)
        among = (obs.valid & (obs.positions >= self.sinks)).unsqueeze(2)
        logits = obs.terms.capped(logits).masked_fill(~among, -torch.inf)
        scores = softmax(logits, obs.terms.of_heads(heads)).masked_fill(~among, 0.0).mean(2)
        if self.value_norm:
            scores = (scores + self.epsilon) * obs.values.float().masked_fill(~obs.valid.unsqueeze(-1), 0.0).norm(
                dim=-1
            )
        among = among.squeeze(2)
        return torch.where(among, scores, scores.masked_fill(~among, 0.0).amax((1, 2), keepdim=True) + 1)

    def future_queries(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Mean [B, H*G, D] and covariance [B, H*G, D, D] of queries at the positions that follow the prompt."""
        mean, covariance = self._moments(obs)
        rope = obs.rope
        if rope is None:
            return mean, covariance
        cos, sin = (part.mean(1).float()[:, None] for part in rope.after(obs.length, self.future))  # [B, 1, F]
        rotate = rope.layout.rotate
        turned = rotate(covariance, cos.unsqueeze(2), sin.unsqueeze(2)).transpose(2, 3)
        return rotate(mean, cos, sin), rotate(turned, cos.unsqueeze(2), sin.unsqueeze(2))

    def _moments(self, obs: Observation) -> tuple[Tensor, Tensor]:
        if self.measured is None:
            return QueryMoments(self.sinks).moments(obs)
        layers, heads, dim = self.measured["mean"].shape
        shape = (obs.queries.shape[1], obs.keys.shape[3])
        if obs.layer_idx >= layers or (heads, dim) != shape:
            raise UserError(
                f"moments={self.source}: made for {layers} layers of {heads} heads of {dim}, layer {obs.layer_idx} of "
                f"the model has {shape[0]} of {shape[1]}; learnkv calibrate model=MODEL out=FOLDER makes a file"
            )
        mean, covariance = (self.measured[name][obs.layer_idx].to(obs.keys.device) for name in tensors.MOMENTS)
        batch = len(obs.keys)
        return mean.expand(batch, -1, -1), covariance.expand(batch, -1, -1, -1)
