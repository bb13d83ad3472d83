"""Distance of hidden states."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.training.losses import sample_means
from learnkv.training.objectives.base import Comparison, Objective


class HiddenMSE(Objective):
    """Squared distance of the continuation's hidden states from the full cache's, over their own mean square.

    0 where nothing is lost, about 1 where nothing is left. DuoAttention (arXiv 2410.10819) compares the last states
    and does not divide.

    Args:
        layers: `last` compares what the output layer reads, `all` the states after every layer, averaged.
    """

    name = "hidden_mse"
    hidden = True

    def __init__(self, layers: Literal["last", "all"] = "last") -> None:
        super().__init__()
        self.layers = layers

    def forward(self, seen: Comparison) -> Tensor:
        teacher, student = seen.said
        pairs = list(zip(teacher.hidden, student.hidden, strict=True))[-1 if self.layers == "last" else 0 :]
        found = []
        for full, held in ((a.detach().float(), b.float()) for a, b in pairs):
            size = sample_means(full.square().mean(-1), seen.sample, seen.samples)
            found.append(seen.means((held - full).square().mean(-1)) / size.clamp_min(1e-12))
        return torch.stack(found).mean(0)
