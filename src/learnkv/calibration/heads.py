"""Head scores of a model, from trials that it answers correctly."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from learnkv.calibration.answering import answer_observations, attention
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
MIN_F1 = 0.5


@torch.no_grad()
def head_scores(
    model: Any, tokenizer: Any, trials: Iterable[Trial], kinds: Sequence[Kind]
) -> dict[Kind, list[list[list[float]]]]:
    """Scores [layer][query head][trial] by kind, over the trials with a word F1 above one half.

    Raises:
        RunError: there is no such trial.
    """
    measured: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}
    count = 0
    for trial in trials:
        count += 1
        cache = prefill(model, trial.context.to(model.device))
        question, length = trial.question.to(model.device), trial.answer.shape[1]
        answer = generate(model, question, cache, max_new_tokens=length, do_sample=False, num_beams=1).cpu()
        if word_f1(tokenizer.decode(answer[0], skip_special_tokens=True), trial.text) <= MIN_F1:
            continue
        prompt = torch.cat([trial.context, trial.question], 1)
        tokens = torch.cat([prompt, answer], 1)[0]
        observations = answer_observations(model, prompt, answer)
        layers = [attention(obs).flatten(0, 1).movedim(1, 0).cpu() for obs in observations]
        for kind, scores in measured.items():
            scores.append(torch.stack([SCORES[kind](layer, tokens, answer[0], trial.needle) for layer in layers]))
    if not all(measured.values()):
        raise RunError(f"the model answered none of {count} trials: expected a model that finds a sentence in a text")
    return {kind: torch.stack(scores, -1).double().tolist() for kind, scores in measured.items()}


def word_f1(prediction: str, truth: str) -> float:
    """F1 of the words of two texts, ignoring case and punctuation."""
    predicted, expected = (Counter(re.findall(r"[\w-]+", text.lower())) for text in (prediction, truth))
    return 2 * (predicted & expected).total() / max(1, predicted.total() + expected.total())
