"""Layers that keep everything, chosen for each prompt by a trained router."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.allocators.pooled_queries import PooledQueries
from learnkv.core.allocator import Allocator, entries_of
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.ops.layer_router import full_margin, router_logits
from learnkv.ops.whole_or_short import whole_or_short


class FluxAttention(Allocator):
    """A router per layer decides between the whole prompt and sinks with a window (Flux Attention, arXiv 2604.07394).

    The router reads the mean query before RoPE over all heads and over the first and the last `pool_size` tokens of the
    prompt, as the authors' Hugging Face code does. Their training pools over the context and the question, and their
    inference engine over the whole prompt. Sparse layers get `sink + recent` entries; as many of the others as the
    budget allows keep the whole prompt, those first of whose need the router is surest. Belongs on scores that rank the
    first `sink` tokens and then the latest ones (`StreamingLLM`).

    The authors' sparse layers attend to a sliding window, and tokens while generating to everything; here layers evict.
    The branch with one logit adds noise to it at inference; here it does not.

    Args:
        router: file of the routers' weights, or `reference`.
        pool_size: first tokens and last ones whose queries are averaged.
        sink: first tokens of a sparse layer.
        recent: latest tokens of a sparse layer.
        decide: by the `budget`, or the `router` alone, whose layers the budget then scales.
    """

    status = "numbers"
    table_argument = "router"
    trained = True
    functions = frozenset({"rotation"})

    def __init__(
        self,
        router: str = "reference",
        pool_size: int = 100,
        sink: int = 128,
        recent: int = 2048,
        decide: Literal["budget", "router"] = "budget",
    ) -> None:
        super().__init__()
        if min(pool_size, sink, recent) < 1:
            raise UserError(f"pool_size={pool_size} sink={sink} recent={recent}: expected at least one token")
        self.source, self.sink, self.recent, self.decide = router, sink, recent, decide
        self.weights = tensors.read(locate(router, "layer_router.safetensors"), tensors.LAYER_ROUTER)
        self.window, self.pooled = pool_size, PooledQueries(pool_size)
        self.statistics = frozenset({self.pooled})

    def features(self, obs: Observation) -> Tensor:
        """[B, H, 1] by how much the router prefers full attention."""
        layers, _, dim = self.weights["f.0.weight"].shape
        if obs.layer_idx >= layers or obs.keys.shape[-1] != dim:
            raise UserError(
                f"router={self.source}: made for {layers} layers of head size {dim}, layer {obs.layer_idx} of the "
                f"model has {obs.keys.shape[-1]}; learnkv calibrate model=MODEL out=FOLDER only=layer_router makes "
                "its file"
            )
        weights = {name: weight[obs.layer_idx].to(obs.keys.device) for name, weight in self.weights.items()}
        margin = full_margin(router_logits(weights, self.pooled.mean(obs)))
        return margin.view(-1, 1, 1).expand(-1, obs.keys.shape[1], -1)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        assert features is not None
        layers = len(self.weights["f.0.weight"])
        if len(features) != layers:
            raise UserError(f"router={self.source}: made for {layers} layers, the model has {len(features)}")
        margin = features[..., 0, 0]  # [L, B]
        entries = entries_of(scores).double()
        short = entries.clamp(max=self.sink + self.recent)
        if self.decide == "router":
            wanted = torch.where(margin > 0, entries, short)
        else:
            wanted = whole_or_short(margin, budget.double(), entries, short)
        return wanted.unsqueeze(-1).expand(scores.shape[:3])
