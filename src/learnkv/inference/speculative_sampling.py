"""Which drafted tokens stand: those that are the most likely ones, or by rejection sampling.

Speculative sampling (arXiv 2211.17192, 2302.01318). All rows of a batch commit equally many tokens: where another row
rejects earlier, a row commits its accepted token at that place and drafts the rest anew.
"""

import torch
from torch import Tensor

from learnkv.inference.sampling import draw


def verified_greedily(drafted: Tensor, scores: Tensor, unfinished: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, n] of the largest scores that all rows commit, and how many drafted ones each row accepts [B].

    Args:
        drafted: [B, T].
        scores: [B, T + 1, V] of the tokens there and of the next one.
        unfinished: [B] rows that have not ended.
    """
    best = scores.argmax(-1)
    accepted = _leading(drafted == best[:, :-1])
    return best[:, : _common(accepted, unfinished, drafted) + 1], accepted


def verified_samples(
    drafted: Tensor, proposals: Tensor | None, target: Tensor, unfinished: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens [B, n] with the distribution `target` that all rows commit, and how many each row accepts [B].

    Args:
        drafted: [B, T].
        proposals: [B, T, V] probabilities that they were drawn with; None where T is 0.
        target: [B, T + 1, V] probabilities of the tokens there and of the next one.
        unfinished: [B] rows that have not ended.
    """
    nothing = torch.zeros_like(target[:, :1])
    offered = nothing if proposals is None else torch.cat([proposals, nothing], 1)
    accepted = _leading(_accepts(drafted, offered[:, :-1], target[:, :-1], generator))
    common = _common(accepted, unfinished, drafted)
    last = _corrected(target[:, common], offered[:, common], generator)
    if common < drafted.shape[1]:
        last = torch.where(accepted > common, drafted[:, common], last)
    return torch.cat([drafted[:, :common], last.unsqueeze(-1)], 1), accepted


def _accepts(drafted: Tensor, proposals: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
    """Which tokens [B, T] are accepted, with probability min(1, target / proposal) [B, T, V]."""
    token = drafted.unsqueeze(-1)
    wanted, offered = (part.gather(-1, token).squeeze(-1) for part in (target, proposals))
    return torch.rand(wanted.shape, generator=generator, device=wanted.device) * offered < wanted


def _corrected(target: Tensor, proposal: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token [B] of what the target [B, V] has above the proposal; of the target where there is no proposal."""
    residual = (target - proposal).clamp_min(0)
    return draw(torch.where(residual.sum(-1, keepdim=True) > 0, residual, target), generator)


def _leading(accepts: Tensor) -> Tensor:
    """How many of [B, T] are accepted up to the first that is not [B]."""
    return accepts.long().cumprod(1).sum(1)


def _common(accepted: Tensor, unfinished: Tensor, drafted: Tensor) -> int:
    """Drafted tokens that all unfinished rows accept (host sync)."""
    return int(torch.where(unfinished, accepted, drafted.shape[1]).min())
