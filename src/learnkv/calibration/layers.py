"""Error of each layer's attention output under compression."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.calibration.answering import answer_observations, attention
from learnkv.calibration.trials import Trial
from learnkv.core.observation import Observation
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy


@torch.no_grad()
def layer_errors(model: Any, trials: Iterable[Trial], policy: Policy, keep: float) -> Tensor:
    """Relative errors [L] of the layers' outputs while answers are decoded, summed over tokens, over their total.

    The output of a layer is that of its output projection (where the model names it `o_proj`, else its input), with the
    true answer and full attention in the layers below; `policy` compresses the context without the question.
    """
    total: Tensor | None = None
    for trial in trials:
        compressed = policy.compress(prefill(model, trial.context.to(model.device), policies=[policy]), keep)
        errors = []
        observations = answer_observations(model, torch.cat([trial.context, trial.question], 1), trial.answer)
        for layer_idx, obs in zip(compressed.compressible, observations, strict=True):
            kept = torch.ones_like(obs.valid)
            kept[..., : trial.context.shape[1]] = False
            for head in range(kept.shape[1]):
                kept[0, head, compressed.kept_positions(layer_idx, 0, head)] = True
            full, reduced = _output(obs, None), _output(obs, kept)
            errors.append(((reduced - full).norm(dim=-1) / full.norm(dim=-1)).sum().cpu())
        total = torch.stack(errors) if total is None else total + torch.stack(errors)
    assert total is not None
    return total.double() / total.double().sum()


def _output(obs: Observation, valid: Tensor | None) -> Tensor:
    """Attention output [A, E] of the answer's queries."""
    output = torch.einsum("hgas,hsd->ahgd", attention(obs, valid), obs.values[0].float()).flatten(1)
    return output if obs.project is None else output @ obs.projection.float().T
