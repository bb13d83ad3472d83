"""`python -m learnkv.head_scores model=MODEL out=FILE`: which query heads retrieve, in HeadKV's format."""

import sys
from dataclasses import dataclass, field
from typing import Literal

from learnkv.calibration.heads import head_scores
from learnkv.calibration.trials import draw
from learnkv.config import run_main
from learnkv.errors import UserError
from learnkv.formats import headkv
from learnkv.models import load_model


@dataclass(frozen=True)
class HeadScoresConfig:
    """Score the query heads of a model by what they attend to while it answers questions about a text.

    Args:
        model: `reference`, a model's folder or a hub id.
        out: file to write.
        kind: `reasoning` (HeadKV), `copying` (retrieval heads) or `semantic` (CompressKV).
        lengths: tokens of the contexts.
        samples: questions at each length; those count that the model answers.
        seed: of the questions.
        revision, dtype, device, attn: as anywhere a model is loaded.
    """

    model: str = "reference"
    out: str = ""
    kind: Literal["reasoning", "copying", "semantic"] = "reasoning"
    lengths: list[int] = field(default_factory=lambda: [256, 512, 1024])
    samples: int = 20
    seed: int = 0
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("out=: expected a file to write, got nothing")
        if self.samples < 1 or not self.lengths:
            raise UserError(f"samples={self.samples} lengths={self.lengths}: expected at least one of each")


def main(config: HeadScoresConfig, resolved: str) -> None:
    """Measure and write."""
    model, tokenizer = load_model(config.model, config.revision, config.dtype, config.device, config.attn)
    trials = (trial for length in config.lengths for trial in draw(tokenizer, length, config.samples, config.seed))
    scores = head_scores(model, tokenizer, trials, [config.kind])[config.kind]
    print(f"head scores of {len(scores[0][0])} trials: {headkv.write(config.out, scores)}")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:] or ["out="], "head_scores"))
