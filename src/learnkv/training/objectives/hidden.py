"""Distance of hidden states."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.training.losses import sample_means
from learnkv.training.objectives.base import Comparison, Objective


class HiddenMSE(Objective):
    """Mean squared error of the continuation's hidden states against the full cache's, over the mean square of these.

    0 where they are equal, about 1 where they are unrelated. DuoAttention (arXiv 2410.10819) compares the last states
    and does not divide.

    Args:
        layers: `last` compares the inputs of the output layer, `all` the states after every layer, averaged.
    """

    name = "hidden_mse"
    hidden = True

    def __init__(self, layers: Literal["last", "all"] = "last") -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Comparison) -> Tensor:
        teacher, student = inputs.outputs
        pairs = list(zip(teacher.hidden, student.hidden, strict=True))[-1 if self.layers == "last" else 0 :]
        errors = []
        for full, compressed in ((a.detach().float(), b.float()) for a, b in pairs):
            mean_square = sample_means(full.square().mean(-1), inputs.sample, inputs.samples)
            errors.append(inputs.means((compressed - full).square().mean(-1)) / mean_square.clamp_min(1e-12))
        return torch.stack(errors).mean(0)
