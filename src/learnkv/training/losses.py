"""Per-token divergences between the full and the compressed cache, and means over the tokens of a prompt."""

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["uniform", "context"]

_LEAST, _MOST = 0.05, 20.0


def forward_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats, [N], from logits [N, V]; the gradient reaches the student only."""
    log_p, log_q = _log_probabilities(teacher, student, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2


def reverse_kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) in nats, [N], from logits [N, V]; the gradient reaches the student only."""
    log_p, log_q = _log_probabilities(teacher, student, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2


def _log_probabilities(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (teacher.detach().float() / temperature).log_softmax(-1)
    return log_p, (student.float() / temperature).log_softmax(-1)


def context_weights(lost: Tensor, sample: Tensor, samples: int) -> Tensor:
    """Weights [N] of tokens in proportion to how much they need the context, with mean about 1 in every sample.

    Few tokens of natural text depend on distant entries; the gradient of the others is noise.

    Args:
        lost: [N] KL to the full cache when only the protected entries are kept.
        sample: [N] sample of each token.
        samples: number of samples.
    """
    mean = sample_means(lost, sample, samples)[sample]
    return (lost / mean.clamp_min(1e-6)).clamp(_LEAST, _MOST)


def sample_means(values: Tensor, sample: Tensor, samples: int, weights: Tensor | None = None) -> Tensor:
    """(Weighted) means [samples] of `values` [N] within each sample, independent of the other samples."""
    weights = torch.ones_like(values) if weights is None else weights
    total = values.new_zeros(samples).index_add(0, sample, values * weights)
    return total / values.new_zeros(samples).index_add(0, sample, weights).clamp_min(1e-9)
