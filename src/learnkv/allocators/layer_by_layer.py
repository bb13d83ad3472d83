"""Head budgets that follow a layer's own scores, within a static layer budget."""

import torch
from torch import Tensor

from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.uniform import Uniform
from learnkv.core.allocator import Allocator, SequentialAllocator
from learnkv.core.observation import Observation
from learnkv.errors import UserError


class LayerByLayer(SequentialAllocator):
    """One allocator splits the budget over layers before any is read, another splits a layer's budget over its heads.

    For example AdaKV's heads within uniform layers, with at most one layer of the prompt in full. `AdaKV` itself rounds
    over the heads of all layers.

    Args:
        base: budget of each layer; static, with nothing to train. `Uniform` if not given.
        heads: split of a layer's budget over its heads, from that layer alone. `AdaKV` if not given.
    """

    status = "numbers"

    def __init__(self, base: Allocator | None = None, heads: Allocator | None = None) -> None:
        super().__init__()
        self.base = Uniform() if base is None else base
        self.heads = AdaKV() if heads is None else heads
        if not self.base.static or any(True for _ in self.base.parameters()):
            raise UserError(
                f"base={type(self.base).__name__}: expected a heuristic that is static, as Uniform and Pyramid"
            )
        self.window = self.heads.window
        self.functions, self.statistics = self.heads.functions, self.heads.statistics

    def features(self, obs: Observation) -> Tensor | None:
        return self.heads.features(obs)

    def baseline_budgets(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        return self.base.baseline_budgets(scores, layers, budget)

    def layer(
        self, layer_idx: int, baseline: Tensor, scores: Tensor, features: Tensor | None, earlier: Tensor
    ) -> Tensor:
        total = baseline[layer_idx].double()
        own = None if features is None else features[layer_idx:]
        wanted = self.heads(scores.unsqueeze(0), own, total.mean(-1))[0].double()
        return wanted * (total.sum(-1) / wanted.sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)).unsqueeze(-1)
