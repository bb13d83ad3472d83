"""How far compression moves the output of each layer's attention."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.calibration.answering import answering, attention
from learnkv.calibration.trials import Trial
from learnkv.core.observation import Observation
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy


@torch.no_grad()
def layer_errors(model: Any, trials: Iterable[Trial], policy: Policy, keep: float) -> Tensor:
    """Relative errors [L] of the layers' outputs while answers are given, sums over steps, divided by their total.

    The output of a layer is that of its output projection (where the model names it `o_proj`, else its input), with the
    true answer and full attention below; the context is compressed as `policy` does it, before the question is known.
    """
    total: Tensor | None = None
    for trial in trials:
        small = policy.compress(prefill(model, trial.context.to(model.device), policies=[policy]), keep)
        errors = []
        before = torch.cat([trial.context, trial.question], 1)
        for index, obs in zip(small.compressible, answering(model, before, trial.answer), strict=True):
            kept = torch.ones_like(obs.valid)
            kept[..., : trial.context.shape[1]] = False
            for head in range(kept.shape[1]):
                kept[0, head, small.kept_positions(index, 0, head)] = True
            whole, less = _output(obs, None), _output(obs, kept)
            errors.append(((less - whole).norm(dim=-1) / whole.norm(dim=-1)).sum().cpu())
        total = torch.stack(errors) if total is None else total + torch.stack(errors)
    assert total is not None
    return total.double() / total.double().sum()


def _output(obs: Observation, valid: Tensor | None) -> Tensor:
    """[A, E] of the answer's queries."""
    each = torch.einsum("hgas,hsd->ahgd", attention(obs, valid), obs.values[0].float()).flatten(1)
    return each if obs.output_weight is None else each @ obs.output_weight.float().T
