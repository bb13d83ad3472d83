"""Head scores of a model, from trials that it answers."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from learnkv.calibration.answering import answering, attention
from learnkv.calibration.trials import Trial
from learnkv.errors import RunError
from learnkv.inference.generate import generate
from learnkv.inference.prefill import prefill
from learnkv.ops import retrieval_heads

Kind = Literal["reasoning", "copying", "semantic"]
SCORES: dict[Kind, Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]] = {
    "reasoning": retrieval_heads.reasoning,
    "copying": retrieval_heads.copying,
    "semantic": retrieval_heads.semantic,
}
ENOUGH = 0.5


@torch.no_grad()
def head_scores(
    model: Any, tokenizer: Any, trials: Iterable[Trial], kinds: Sequence[Kind]
) -> dict[Kind, list[list[list[float]]]]:
    """Scores [layer][query head][trial] by kind, of the trials whose answer shares more than half with the true one.

    Raises:
        RunError: there is no such trial.
    """
    found: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    asked = 0
    for trial in trials:
        asked += 1
        cache = prefill(model, trial.context.to(model.device))
        said = generate(model, trial.question.to(model.device), cache, max_new_tokens=trial.answer.shape[1]).cpu()
        if overlap(tokenizer.decode(said[0], skip_special_tokens=True), trial.text) <= ENOUGH:
            continue
        prompt = torch.cat([trial.context, trial.question], 1)
        tokens = torch.cat([prompt, said], 1)[0]
        layers = [attention(obs).flatten(0, 1).movedim(1, 0).cpu() for obs in answering(model, prompt, said)]
        for kind, scores in found.items():
            scores.append(torch.stack([SCORES[kind](one, tokens, said[0], trial.needle) for one in layers]))
    if not all(found.values()):
        raise RunError(f"the model answered none of {asked} trials: expected a model that finds a sentence in a text")
    return {kind: torch.stack(scores, -1).double().tolist() for kind, scores in found.items()}


def overlap(said: str, true: str) -> float:
    """F1 of the words of two texts, whatever their case and punctuation."""
    ours, theirs = (Counter(re.findall(r"[\w-]+", text.lower())) for text in (said, true))
    return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())
