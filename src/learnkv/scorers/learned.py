"""A learned correction of a heuristic's scores, entry by entry."""

import math

import torch
from torch import Tensor, nn

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.window_scores import window_scores
from learnkv.scorers.random import Random
from learnkv.scorers.residual import Residual, unit

_NEIGHBOURS = 7
_GROWTH = 30  # a scale may change by orders of magnitude at a rate that suits the weights of a network
_MOST = 8  # limit of a log scale: beyond it a head's order is all noise, or has none
_SMALLEST = 2.0**-24  # the step of `Random`, and of float32 below 1


class LearnedScorer(Residual):
    """A heuristic's scores plus a small network per (layer, kv head) that reads the entry.

    The network reads the normalised key and value, the logarithm of the attention that the last prompt queries give to
    the entry and to its neighbours, the heuristic's own normal score and, with `rank`, a projection of the token's
    hidden state that the heads of a layer share. A direct linear path bypasses the hidden units: those of heads that
    keep everything die in training, and with them the order within such a head. Both parts are zero at initialisation.
    ForesightKV (ICML 2026) has such a network without a heuristic.

    Args:
        base: the heuristic; see `Residual`.
        num_layers: layers of the model; 0 until `train.py` fills in this and the other sizes of the model.
        num_heads: kv heads per layer.
        head_dim: D of the model.
        width: hidden units per head.
        window: last prompt queries whose attention is a feature.
        rank: numbers that hidden states are projected to; 0: they are not read.
        sampling: initial scale of Gumbel noise that is added to the scores within each head, a fixed function of layer,
            head and position; 0: none. With a scale of 1, the kept entries are a sample without replacement, each entry
            drawn in proportion to the exponential of its score (Kool et al., arXiv 1903.06059). Heads that average over
            the whole prompt need a sample: entries with the highest scores do not represent the rest (MagicPIG, arXiv
            2410.16179, samples for this reason). Heads that retrieve need none. So every head learns a scale. With
            noise, a policy at initialisation keeps a sample by the heuristic's scores, not its best entries.
        hidden_size: E of the model.
    """

    def __init__(
        self,
        base: Scorer,
        num_layers: int = 0,
        num_heads: int = 0,
        head_dim: int = 0,
        width: int = 16,
        window: int = 16,
        rank: int = 0,
        hidden_size: int = 0,
        sampling: float = 0.0,
    ) -> None:
        super().__init__(base, num_layers, num_heads)
        if width < 1 or window < 1 or rank < 0 or not 0 <= sampling < math.inf:
            raise UserError(
                f"width={width} window={window} rank={rank} sampling={sampling}: expected at least 1, 1, 0 and 0"
            )
        self.sampling, self._noise = sampling, Random()
        self.sampling_growth = (
            nn.Parameter(torch.zeros(num_layers, num_heads, 1, dtype=torch.float32)) if sampling > 0 else None
        )
        self.window = max(base.window, window)
        self._own_window = window
        features = 2 * head_dim + 5 + rank
        self.weight_in = nn.Parameter(
            torch.randn(num_layers, num_heads, features, width, dtype=torch.float32) * features**-0.5
        )
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, 1, width, dtype=torch.float32))
        self.weight_out = nn.Parameter(torch.zeros(num_layers, num_heads, width, 1, dtype=torch.float32))
        self.weight_direct = nn.Parameter(torch.zeros(num_layers, num_heads, features, 1, dtype=torch.float32))
        self.project: nn.Parameter | None = None
        if rank > 0:
            self._caches_features(hidden=True)
            self.project = nn.Parameter(
                torch.randn(num_layers, hidden_size, rank, dtype=torch.float32) * max(1, hidden_size) ** -0.5
            )

    @property
    def refines(self) -> bool:
        return self.sampling_growth is not None

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        return scores + self.sampling_scales()[obs.layer_idx] * self._gumbel(obs) if self.refines else scores

    def sampling_scales(self) -> Tensor:
        """[L, H, 1] scale of the noise on the scores of each head."""
        if self.sampling_growth is None:
            return torch.zeros(*self.shape, 1, dtype=torch.float32)
        return self.sampling * (_GROWTH * self.sampling_growth).clamp(-_MOST, _MOST).exp()

    def correction(self, obs: Observation, baseline: Tensor) -> Tensor:
        layer = obs.layer_idx
        with torch.no_grad():
            inputs = torch.cat([self._entries(obs), self._attention(obs), baseline.unsqueeze(-1)], -1)
            inputs = inputs.to(self.weight_in.dtype)
        if self.project is not None:
            inputs = torch.cat([inputs, self.cached_features(obs).expand(-1, inputs.shape[1], -1, -1)], -1)
        hidden = nn.functional.gelu(inputs @ self.weight_in[layer] + self.bias[layer])
        correction: Tensor = (hidden @ self.weight_out[layer] + inputs @ self.weight_direct[layer]).squeeze(-1)
        return correction

    def token_features(self, obs: Observation) -> Tensor:
        """Hidden states, projected, [B, 1, S, rank]; the same for all heads."""
        assert obs.hidden is not None
        assert self.project is not None
        return (unit(obs.hidden) @ self.project[obs.layer_idx]).unsqueeze(1)

    def _gumbel(self, obs: Observation) -> Tensor:
        """[B, H, S], of the standard Gumbel distribution."""
        uniform = self._noise(obs).clamp(_SMALLEST, 1 - _SMALLEST)
        return -(-uniform.log()).log()

    def _entries(self, obs: Observation) -> Tensor:
        """Keys and values, each of mean square 1, [B, H, S, 2D]."""
        return torch.cat([unit(obs.keys), unit(obs.values)], -1)

    def _attention(self, obs: Observation) -> Tensor:
        """Log attention relative to uniform attention, [B, H, S, 4].

        Mean and maximum over the query heads of a kv head, and both smoothed over neighbours as SnapKV does.
        """
        of_query_heads = window_scores(
            obs.queries[:, :, -self._own_window :],
            obs.keys,
            query_positions=obs.query_positions[:, -self._own_window :],
            positions=obs.positions,
            valid=obs.valid,
            scaling=obs.scaling,
            terms=obs.terms,
            kernel_size=1,
            group_reduce="none",
        )
        reduced = torch.stack([of_query_heads.mean(2), of_query_heads.amax(2)])
        smooth = nn.functional.avg_pool1d(reduced.flatten(0, 1), _NEIGHBOURS, 1, _NEIGHBOURS // 2).view_as(reduced)
        entries = obs.valid.sum(-1, keepdim=True).unsqueeze(-1)
        # Differences five decades below an even spread do not matter; /5 brings the range near to the other inputs'.
        return (torch.cat([reduced, smooth]).movedim(0, -1) * entries).clamp_min(1e-5).log() / 5
