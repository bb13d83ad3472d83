"""What the recipes for larger models need, predicted on the meta device: `python -m benchmarks.recipes`.

Writes the published sizes of each recipe's model as a folder with a `config.json`, counts a step of every objective,
and prints a table of memory, seconds per step and hours per accelerator. Needs no network, no weights and no GPU.
"""

import argparse
import tempfile
from collections.abc import Iterator

from benchmarks.shapes import LLAMA_1B, QWEN3_8B, Shape
from learnkv.cli.parser import parse
from learnkv.training.memory.accelerators import ACCELERATORS
from learnkv.training.memory.predict import CONTEXTS, STEP, EmptyRun, MemoryConfig, gpus_needed
from learnkv.training.memory.step_time import generated_tokens, mean_length, seconds_of

RECIPES = {"llama-1b": (LLAMA_1B, 131072), "qwen3-8b": (QWEN3_8B, 40960)}
"""Model and its context, by `config=`."""
HEADER = "| config | contexts | accelerator | peak, GB | GPUs | step of regression, s | of distillation, s | run, h |"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--accelerators", nargs="*", choices=ACCELERATORS, default=[*ACCELERATORS])
    options = parser.parse_args(argv)
    print(HEADER + "\n" + "|---" * HEADER.count(" |") + "|")
    for name in options.only:
        for line in rows(name, *RECIPES[name], options.accelerators):
            print(line, flush=True)


def rows(name: str, shape: Shape, context: int, accelerators: list[str]) -> Iterator[str]:
    """The lines of one recipe."""
    with tempfile.TemporaryDirectory() as folder:
        shape.config(context).save_pretrained(folder)
        config, _ = parse(MemoryConfig, [f"config={name}", f"model={folder}"], "train")
        run = EmptyRun(config)
        parts = run.memory()
        stages = [(steps, count) for steps, _, count in run.operations()]
    peak, length = sum(parts.values()) / 1e9, mean_length(run.lengths)
    for accelerator in (ACCELERATORS[each] for each in accelerators):
        seconds = [sum(seconds_of(count, accelerator, generated_tokens(config)).values()) for _, count in stages]
        hours = run.hours(sum(steps * each for (steps, _), each in zip(stages, seconds, strict=True)))
        gpus = gpus_needed(run, parts[CONTEXTS] + parts[STEP], accelerator)
        cells = [name, f"{config.data.batch_size} × {length}", accelerator.name, f"{peak:.1f}", gpus or "-"]
        yield f"| {' | '.join(map(str, cells))} | {' | '.join(f'{each:.2f}' for each in seconds)} | {hours:.2f} |"


if __name__ == "__main__":
    main()
