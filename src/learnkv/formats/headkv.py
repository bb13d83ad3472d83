"""HeadKV's head scores: one line of JSON, `{"layer-head": [score of each trial, …], …}`, one key per query head."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, write_text

Trials = Sequence[Sequence[Sequence[float]]]
"""[layer][head][trial]; heads may have different numbers of trials."""


def read(path: str | Path) -> list[list[list[float]]]:
    """Trials [layer][head][trial], whatever the order of the file's keys.

    Raises:
        UserError: no such file, another format, a head that is missing or has no score.
    """
    scores_of = read_json(path)
    if not isinstance(scores_of, dict) or not scores_of:
        raise UserError(f'{path}: expected head scores {{"layer-head": [score, …], …}}')
    trials: dict[tuple[int, int], list[float]] = {}
    for key, scores in scores_of.items():
        layer, _, head = key.partition("-")
        if not (layer.isdecimal() and head.isdecimal()):
            raise UserError(f'{path}: expected keys "layer-head", got {key!r}')
        if not isinstance(scores, list) or not scores or not all(map(_is_number, scores)):
            raise UserError(f"{path}: expected a list of finite numbers for head {key}")
        trials[int(layer), int(head)] = scores
    layers, heads = (1 + max(numbers) for numbers in zip(*trials, strict=True))
    keys = [(layer, head) for layer in range(layers) for head in range(heads)]
    if missing := [key for key in keys if key not in trials]:
        raise UserError(f"{path}: head {missing[0][0]}-{missing[0][1]} of {layers} layers of {heads} is missing")
    return [[trials[layer, head] for head in range(heads)] for layer in range(layers)]


def write(path: str | Path, trials: Trials) -> Path:
    """Write trials [layer][head][trial]."""
    scores_of = {
        f"{layer}-{head}": list(scores) for layer, heads in enumerate(trials) for head, scores in enumerate(heads)
    }
    return write_text(path, json.dumps(scores_of))


def mean_scores(trials: Trials) -> Tensor:
    """The plain mean over trials, [L, H] float64."""
    return torch.tensor(
        [[math.fsum(scores) / len(scores) for scores in heads] for heads in trials], dtype=torch.float64
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
