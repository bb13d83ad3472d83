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
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.results import Part, arguments
from learnkv import generate, load_cache, load_model, load_policy, prefill, save_cache

QUESTION = "\nIn one sentence, what is this text about? It is about"
ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv, repeats={"type": int, "default": 5}, load={"default": ""})
    name, tokens = ("reference", 256) if options.dry_run else ("smollm2", 4000)
    if options.load:
        _print_load(name, Path(options.load))
        return Part(None, "stored_context", options.dry_run)
    part = Part(options.out, "stored_context", options.dry_run)
    model, tokenizer = load_model(name, device="cpu")
    prompt, question = text_ids(tokenizer, tokens), tokenizer(QUESTION, return_tensors="pt").input_ids
    policy = load_policy("snapkv")
    reads = []
    for _ in range(1 if options.dry_run else 3):
        begin = time.perf_counter()
        cache = prefill(model, prompt, policies=[policy])
        first = generate(model, question, cache.fork(), max_new_tokens=1)
        reads.append(time.perf_counter() - begin)
    read = statistics.median(reads)
    part.add(kernel="read to first token", model=name, T=tokens, seconds=read)
    for keep in (1.0, 0.1):
        small = policy.compress(cache.fork(), keep=keep)
        expected = int(first) if keep == 1 else int(generate(model, question, small.fork(), max_new_tokens=1))
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            save_cache(small, folder)
            saved = time.perf_counter() - begin
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            loads = [_load(folder, options) for _ in range(1 if options.dry_run else options.repeats)]
        assert all(load["token"] == expected for load in loads)
        seconds = statistics.median(load["seconds"] for load in loads)
        again = statistics.median(load["again"] for load in loads)
        sizes = {"cache_bytes": small.nbytes, "disk_bytes": size}
        part.add(kernel="save", model=name, T=tokens, keep=keep, seconds=saved, **sizes)
        part.add(
            kernel="load to first token", model=name, T=tokens, keep=keep, seconds=seconds, ratio=read / seconds,
            seconds_in_one_process=again,
        )  # fmt: skip
    part.finish()
    return part


def text_ids(tokenizer: object, count: int) -> Tensor:
    """The first tokens of this project's documentation [1, count]."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids: Tensor = tokenizer(text[: 8 * count], return_tensors="pt").input_ids[:, :count]  # type: ignore[operator]
    return ids


def _load(folder: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.stored_context", "--load", folder]
    command += ["--dry-run"] if options.dry_run else []
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return loaded


def _print_load(name: str, folder: Path) -> None:
    """Load twice, the second time with digests known and the file in memory; print seconds and the first token."""
    model, tokenizer = load_model(name, device="cpu")
    question = tokenizer(QUESTION, return_tensors="pt").input_ids
    seconds = []
    for turn in range(2):
        if turn == 0:
            _forget(folder)
        begin = time.perf_counter()
        token = generate(model, question, load_cache(folder, model), max_new_tokens=1)
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": seconds[0], "again": seconds[1], "token": int(token)}))


def _forget(folder: Path) -> None:
    """Ask the system to drop its copies of the files in memory."""
    if hasattr(os, "posix_fadvise"):
        for file in folder.iterdir():
            with file.open("rb") as content:
                os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    main()
