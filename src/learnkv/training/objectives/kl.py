"""Divergences of what the model says after compression from what it says with the full cache."""

from torch import Tensor

from learnkv.errors import UserError
from learnkv.training.losses import forward_kl, reverse_kl
from learnkv.training.objectives.base import Comparison, Objective


class ForwardKL(Objective):
    """KL(teacher || student) of the next token in nats: what the full cache finds likely must stay likely.

    Args:
        temperature: divides the logits of both; the result is multiplied by its square, which keeps the gradient's
            size (Hinton et al., arXiv 1503.02531).
    """

    name = "kl"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, seen: Comparison) -> Tensor:
        teacher, student = seen.said
        return seen.means(forward_kl(teacher.logits, student.logits, self.temperature))


class ReverseKL(Objective):
    """KL(student || teacher) of the next token in nats: nothing may become likely that the full cache finds unlikely.

    Args:
        temperature: as of `ForwardKL`.
    """

    name = "reverse_kl"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, seen: Comparison) -> Tensor:
        teacher, student = seen.said
        return seen.means(reverse_kl(teacher.logits, student.logits, self.temperature))


def _positive(temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature={temperature:g}: expected more than 0")
    return temperature
