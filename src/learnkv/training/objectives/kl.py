"""Divergences between the next-token distributions with the compressed and with the full cache."""

from torch import Tensor

from learnkv.errors import UserError
from learnkv.training.losses import forward_kl, reverse_kl
from learnkv.training.objectives.base import Comparison, Objective


class ForwardKL(Objective):
    """KL(teacher || student) of the next token in nats: covers every likely token of the teacher.

    Args:
        temperature: divides the logits of both; the loss is multiplied by its square, which keeps the gradient's size
            (Hinton et al., arXiv 1503.02531).
        saturation: nats s from which a prompt's mean loss grows with its logarithm, s·log(1 + KL/s): small budgets lose
            a hundred times what large ones lose, and would have all of the gradient. None: never.
    """

    name = "kl"

    def __init__(self, temperature: float = 1.0, saturation: float | None = None) -> None:
        super().__init__()
        self.temperature = _positive(temperature)
        self.saturation = None if saturation is None else _positive(saturation, "saturation")

    def forward(self, inputs: Comparison) -> Tensor:
        teacher, student = inputs.outputs
        losses = inputs.means(forward_kl(teacher.logits, student.logits, self.temperature))
        return losses if self.saturation is None else self.saturation * (losses / self.saturation).log1p()


class ReverseKL(Objective):
    """KL(student || teacher) of the next token in nats: penalises tokens that are unlikely for the teacher.

    Args:
        temperature: as in `ForwardKL`.
    """

    name = "reverse_kl"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, inputs: Comparison) -> Tensor:
        teacher, student = inputs.outputs
        return inputs.means(reverse_kl(teacher.logits, student.logits, self.temperature))


def _positive(value: float, name: str = "temperature") -> float:
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={value:g}: expected more than 0")
    return value
