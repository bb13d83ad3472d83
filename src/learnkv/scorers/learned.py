"""A learned correction of a heuristic's scores, entry by entry."""

import torch
from torch import Tensor, nn

from learnkv.errors import UserError
from learnkv.observation import Observation
from learnkv.ops.normal_scores import normal_scores
from learnkv.ops.window_scores import window_scores
from learnkv.scorers.base import Scorer


class LearnedScorer(Scorer):
    """Normal scores of a heuristic's ranks plus a small network per (layer, kv head) that sees the entry.

    The network reads the normalised key and value, the attention of the last prompt queries in
    logs, and the heuristic's own normal score. Its last layer starts at zero, so that at first every order, within a
    head and between the heads of a layer, is the heuristic's, ties included. Allocators that use the size of scores
    and not only their order get normal scores to see.

    Args:
        base: the heuristic to start from.
        num_layers: layers of the model; 0 until `train.py` fills in this and the next two.
        num_heads: kv heads per layer.
        head_dim: D of the model.
        width: hidden units per head.
        window: last prompt queries whose attention is a feature.
    """

    def __init__(
        self,
        base: Scorer,
        num_layers: int = 0,
        num_heads: int = 0,
        head_dim: int = 0,
        width: int = 16,
        window: int = 16,
    ) -> None:
        super().__init__()
        if width < 1 or window < 1:
            raise UserError(f"width={width} window={window}: expected at least 1 of each")
        self._builds_on(base)
        self.base = base
        self.window = max(base.window, window)
        self._own_window = window
        features = 2 * head_dim + 3
        self.weight_in = nn.Parameter(torch.randn(num_layers, num_heads, features, width) * features**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, 1, width))
        self.weight_out = nn.Parameter(torch.zeros(num_layers, num_heads, width, 1))

    def forward(self, seen: Observation) -> Tensor:
        layers, heads = self.bias.shape[:2]
        if seen.layer_idx >= layers or seen.keys.shape[1] != heads:
            raise UserError(
                f"num_layers={layers} num_heads={heads}: the model has layer {seen.layer_idx} with {seen.keys.shape[1]}"
            )
        with torch.no_grad():
            prior = normal_scores(self.base(seen), seen.valid)
            inputs = torch.cat([self._entries(seen), self._attention(seen), prior.unsqueeze(-1)], -1)
        layer = seen.layer_idx
        hidden = nn.functional.gelu(inputs @ self.weight_in[layer] + self.bias[layer])
        return prior + (hidden @ self.weight_out[layer]).squeeze(-1)

    def _entries(self, seen: Observation) -> Tensor:
        """Keys and values, each of mean square 1, [B, H, S, 2D]."""
        keys, values = seen.keys.float(), seen.values.float()
        return torch.cat([x * x.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt() for x in (keys, values)], -1)

    def _attention(self, seen: Observation) -> Tensor:
        """Log attention over an even spread's, mean and maximum over the query heads of a kv head: [B, H, S, 2]."""
        reduced = [
            window_scores(
                seen.queries[:, :, -self._own_window :],
                seen.keys,
                query_positions=seen.query_positions[:, -self._own_window :],
                positions=seen.positions,
                valid=seen.valid,
                scaling=seen.scaling,
                kernel_size=1,
                group_reduce=how,
            )
            for how in ("mean", "max")
        ]
        entries = seen.valid.sum(-1, keepdim=True).unsqueeze(-1)
        # Five decades below an even spread nothing is worth telling apart; /5 brings the range near to the others'.
        return (torch.stack(reduced, -1) * entries).clamp_min(1e-5).log() / 5
