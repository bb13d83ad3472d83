"""Head budgets that follow a layer's own scores, in a layer whose budget is known beforehand."""

import torch
from torch import Tensor

from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.uniform import Uniform
from learnkv.core.allocator import Allocator, SequentialAllocator
from learnkv.core.observation import Observation
from learnkv.errors import UserError


class LayerByLayer(SequentialAllocator):
    """One allocator says what a layer gets, before it is read, another how its heads share that, once it has been.

    AdaKV's heads within uniform layers, say, and never more than one layer of the prompt in full. `AdaKV` itself
    settles the last few entries between the heads of all layers.

    Args:
        base: what a layer gets; static, with nothing to train. `Uniform` if not given.
        heads: how a layer's heads share it, asked for that layer alone. `AdaKV` if not given.
    """

    def __init__(self, base: Allocator | None = None, heads: Allocator | None = None) -> None:
        super().__init__()
        self.base = Uniform() if base is None else base
        self.heads = AdaKV() if heads is None else heads
        if not self.base.static or any(True for _ in self.base.parameters()):
            raise UserError(
                f"base={type(self.base).__name__}: expected a heuristic that is static, as Uniform and Pyramid"
            )
        self.window = self.heads.window

    def features(self, obs: Observation) -> Tensor | None:
        return self.heads.features(obs)

    def prior(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        return self.base.prior(scores, layers, budget)

    def layer(self, at: int, prior: Tensor, scores: Tensor, features: Tensor | None, before: Tensor) -> Tensor:
        share = prior[at].double()
        own = None if features is None else features[at:]
        wish = self.heads(scores.unsqueeze(0), own, share.mean(-1))[0].double()
        return wish * (share.sum(-1) / wish.sum(-1).clamp_min(torch.finfo(wish.dtype).tiny)).unsqueeze(-1)
