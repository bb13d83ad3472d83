"""Head scores by what each head adds to the logit of the answer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.calibration.answering import answer_observations, attention
from learnkv.calibration.trials import Trial
from learnkv.errors import RunError
from learnkv.inference.generate import generate
from learnkv.inference.prefill import prefill
from learnkv.ops.logit_contribution import logit_contribution, on_and_off


@torch.no_grad()
def logit_heads(model: Any, trials: Iterable[Trial]) -> list[list[list[float]]]:
    """Scores [layer][query head][trial] by LOCOS (arXiv 2607.01002), over the trials whose tokens the model answers.

    A step's score is the contribution of the needle less that of as many other positions, on average; a trial's is the
    mean over the tokens of its answer.

    Raises:
        RunError: there is no such trial.
    """
    measured: list[Tensor] = []
    count, rows = 0, model.get_output_embeddings().weight
    for trial in trials:
        count += 1
        cache = prefill(model, trial.context.to(model.device))
        settings: dict[str, Any] = {"max_new_tokens": trial.answer.shape[1], "do_sample": False, "num_beams": 1}
        if not torch.equal(generate(model, trial.question.to(model.device), cache, **settings).cpu(), trial.answer):
            continue
        unembedding = rows[trial.answer[0].to(rows.device)].float()
        layers = []
        for obs in answer_observations(model, torch.cat([trial.context, trial.question], 1), trial.answer):
            parts = (obs.values[0].float(), obs.projection.float(), unembedding.to(obs.values.device))
            on, off = on_and_off(logit_contribution(attention(obs), *parts), trial.needle)
            layers.append((on - off).mean(-1).flatten().cpu())
        measured.append(torch.stack(layers))
    if not measured:
        raise RunError(f"the model answered none of {count} trials: expected a model that finds a sentence in a text")
    return torch.stack(measured, -1).double().tolist()
