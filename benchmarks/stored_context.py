"""From a stored cache to the first token, against reading again: `python -m benchmarks.stored_context --out FILE`.

A text of 4,000 tokens is read by SmolLM2-135M-Instruct (`learnkv fetch smollm2`), and its cache stored complete and
compressed. Every load runs in a process of its own, whose clock begins when the model is loaded; the file is not in
memory then, as far as the system lets a program ask for that, and the digests of file and model are computed. Both end
with the first token of the same answer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Part, arguments
from learnkv import generate, load_cache, load_model, load_policy, prefill, save_cache

QUESTION = "\nIn one sentence, what is this text about? It is about"
ROOT = Path(__file__).resolve().parents[1]


class Stopwatch:
    """Seconds of a block: on the clock, and those of this process on a processor, whatever else runs."""

    def __enter__(self) -> "Stopwatch":
        self._begin = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._begin
        self.seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}

    @staticmethod
    def median(watches: Sequence["Stopwatch"]) -> dict[str, float]:
        """Of each kind of seconds."""
        return {key: statistics.median(watch.seconds[key] for watch in watches) for key in watches[0].seconds}


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(
        __doc__, argv, repeats={"type": int, "default": 5}, reads={"type": int, "default": 3}, load={"default": ""}
    )
    name, tokens = ("reference", 256) if options.dry_run else ("smollm2", 4000)
    if options.load:
        _print_load(name, Path(options.load))
        return Part(None, "stored_context", options.dry_run)
    part = Part(options.out, "stored_context", options.dry_run)
    model, tokenizer = load_model(name, device="cpu")
    prompt, question = text_ids(tokenizer, tokens), tokenizer(QUESTION, return_tensors="pt").input_ids
    policy = load_policy("snapkv")
    reads = [Stopwatch() for _ in range(1 if options.dry_run else options.reads)]
    for watch in reads:
        with watch:
            cache = prefill(model, prompt, policies=[policy])
            first = generate(model, question, cache.fork(), max_new_tokens=1)
    read = Stopwatch.median(reads)
    part.add(kernel="read to first token", model=name, T=tokens, **read)
    for keep in (1.0, 0.1):
        small = policy.compress(cache.fork(), keep=keep)
        expected = int(first) if keep == 1 else int(generate(model, question, small.fork(), max_new_tokens=1))
        with tempfile.TemporaryDirectory() as folder:
            with Stopwatch() as saved:
                save_cache(small, folder)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            loads = [_load(folder, options) for _ in range(1 if options.dry_run else options.repeats)]
        assert all(load["token"] == expected for load in loads)
        sizes = {"cache_bytes": small.nbytes, "disk_bytes": size}
        part.add(kernel="save", model=name, T=tokens, keep=keep, **saved.seconds, **sizes)
        for turn, kernel in enumerate(("load to first token", "load again to first token")):
            load = {key: statistics.median(row["turns"][turn][key] for row in loads) for key in read}
            ratios = {f"{key}_ratio": read[key] / load[key] for key in read}
            part.add(kernel=kernel, model=name, T=tokens, keep=keep, **load, **ratios)
    part.finish()
    return part


def text_ids(tokenizer: object, count: int) -> Tensor:
    """The first tokens of this project's documentation [1, count]."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids: Tensor = tokenizer(text[: 8 * count], return_tensors="pt").input_ids[:, :count]  # type: ignore[operator]
    return ids


def _load(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.stored_context", "--load", folder]
    command += ["--dry-run"] if options.dry_run else []
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return loaded


def _print_load(name: str, folder: Path) -> None:
    """Load twice, the second time with digests known and the file in memory; print seconds and the first token."""
    model, tokenizer = load_model(name, device="cpu")
    question = tokenizer(QUESTION, return_tensors="pt").input_ids
    turns = []
    for turn in range(2):
        if turn == 0:
            _forget(folder)
        with Stopwatch() as watch:
            token = generate(model, question, load_cache(folder, model), max_new_tokens=1)
        turns.append(watch.seconds)
    print(json.dumps({"turns": turns, "token": int(token)}))


def _forget(folder: Path) -> None:
    """Ask the system to drop its copies of the files in memory."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            with file.open("rb") as content:
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
