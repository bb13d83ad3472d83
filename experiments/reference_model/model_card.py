"""`python -m experiments.reference_model.model_card [key=value ...]` measures the model and writes its card."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.reference_model.measure import Figure, Perplexity, perplexity, ruler_figure
from learnkv.cli.parser import run_main
from learnkv.data.haystack import essay
from learnkv.data.ruler import TASKS, Ruler
from learnkv.data.text import text_windows
from learnkv.errors import UserError
from learnkv.inference.models import REFERENCE, load_model

BARS = {
    "niah_single_1": 95,
    "niah_single_2": 95,
    "niah_single_3": 80,
    "niah_multikey_1": 95,
    "niah_multikey_2": 95,
    "niah_multikey_3": 80,
    "niah_multivalue": 95,
    "niah_multiquery": 95,
    "vt": 80,
}
BAR_LENGTH = 1024
WINDOW = 512


@dataclass(frozen=True)
class CardConfig:
    """What is measured and where the card goes.

    Args:
        model: `reference` or a Hugging Face folder.
        output: the card.
        tasks: RULER tasks; the two QA tasks need `qa`.
        lengths: tokens of a prompt with room for its answer.
        samples: prompts of a task and length.
        batch: prompts read at once.
        text: files of text that was not trained on, for the perplexity.
        windows: windows of 512 tokens for each perplexity.
        haystack: file of essays; CPython's help topics if empty.
        qa: files for qa_1 and qa_2.
        device: as anywhere a model is loaded.
        threads: CPU threads, 0 for PyTorch's own choice.
    """

    model: str = "reference"
    output: str = str(REFERENCE / "README.md")
    tasks: list[str] = field(default_factory=lambda: [task for task in TASKS if not task.startswith("qa")])
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    samples: int = 50
    batch: int = 10
    text: list[str] = field(default_factory=list)
    windows: int = 100
    haystack: str = ""
    qa: list[str] = field(default_factory=list)
    device: str = "auto"
    threads: int = 0


def measure(config: CardConfig, say: Callable[[str], None]) -> tuple[list[Figure], dict[str, Perplexity]]:
    """Every figure of the card. A task that does not fit a length has no figure there."""
    if config.threads:
        torch.set_num_threads(config.threads)
    model, tokenizer = load_model(config.model, dtype="float32", device=config.device)
    found = []
    for length in config.lengths:
        ruler = Ruler(tokenizer, length, haystack=config.haystack or None, qa=config.qa)
        for task in config.tasks:
            try:
                found.append(ruler_figure(model, tokenizer, ruler, task, config.samples, config.batch))
            except UserError as error:
                say(f"left out: {error}")
                continue
            say(f"{length} {task} {found[-1].score:.1f} ± {found[-1].stderr:.1f}")
    topics = torch.tensor(tokenizer(" ".join(essay()))["input_ids"])
    read = {"CPython's help topics": perplexity(model, iter(topics.split(WINDOW)[: config.windows]))}
    if config.text:
        held_out = text_windows(config.text, tokenizer, WINDOW, streaming=True).take(config.windows)
        read["public-domain books"] = perplexity(model, (row["input_ids"] for row in held_out))
    for name, result in read.items():
        say(f"perplexity of {name}: {result.model:.1f}, unigram {result.unigram:.1f}")
    return found, read


def table(figures: list[Figure]) -> str:
    """Markdown: a row per task, a column per length."""
    lengths = sorted({figure.length for figure in figures})
    cells = {(f.task, f.length): f"{f.score:.1f} ± {f.stderr:.1f}" for f in figures}
    lines = ["| task | bar at 1,024 | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("| --- " * (len(lengths) + 2) + "|")
    for task in dict.fromkeys(figure.task for figure in figures):
        bar = str(BARS.get(task, "-"))
        lines.append(f"| {task} | {bar} | " + " | ".join(cells.get((task, n), "does not fit") for n in lengths) + " |")
    return "\n".join(lines)


def missed(figures: list[Figure]) -> list[str]:
    """Tasks below their bar at 1,024 tokens."""
    return [f.task for f in figures if f.length == BAR_LENGTH and f.score < BARS.get(f.task, 0)]


def main(config: CardConfig, resolved: str) -> None:
    """Measure and write the card."""
    figures, read = measure(config, lambda line: print(line, flush=True))
    below = missed(figures)
    verdict = (
        f"Below its bar, and so left out of the quickstart's means: {', '.join(below)}. The method comparison's means\n"
        "have every task with a bar, the study's those that the full cache can do on its prompts."
        if below
        else "Every task with a bar reaches it."
    )
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    lines = [
        f"- {name}: {r.model:.1f} per token of this tokenizer over {r.tokens:,} tokens; a unigram model of the same "
        f"text has {r.unigram:.1f}"
        for name, r in read.items()
    ]
    card = template.format(samples=config.samples, table=table(figures), verdict=verdict, perplexity="\n".join(lines))
    Path(config.output).write_text(card, encoding="utf-8")
    print(f"card: {config.output}")


if __name__ == "__main__":
    sys.exit(
        run_main(main, sys.argv[1:] or ["model=reference"], "train", "python -m experiments.reference_model.model_card")
    )
