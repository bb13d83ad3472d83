"""Peak memory of reading and tokenising a large text file: `python -m benchmarks.text_memory --megabytes 50`.

One document as plain text, one as a JSON line, and many JSON lines, each tokenised into `datasets`' cache and streamed.
Every case is a fork of a process that has imported everything and loaded the tokenizer. Prints the peak resident memory
above that at the fork, from Linux's VmHWM: `ru_maxrss` would begin with the memory of the process that started it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

KINDS = ("one.txt", "one.jsonl", "many.jsonl")
LIMIT_MB = 1500
"""Most that any case may need."""

_CHILD = """
import os, sys, datasets, transformers
from learnkv.data.text import text_windows
from learnkv.inference.models import REFERENCE
cache, *cases = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = cache
tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE)
def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))
def measure(file, streaming):
    before = kilobytes("VmRSS")
    count = sum(1 for _ in text_windows(file, tokenizer, 1152, streaming=streaming))
    print("peak", round((kilobytes("VmHWM") - before) * 1024 / 1e6), count, flush=True)
for file in cases:
    for streaming in (False, True):
        process = os.fork()
        if process == 0:
            try:
                measure(file, streaming)
                os._exit(0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        if os.waitpid(process, 0)[1]:
            sys.exit(f"{file}, streaming={streaming}: failed")
"""


def write_text(file: Path, megabytes: float) -> None:
    """Write about this much English in the layout that the file's name stands for."""
    from learnkv.data.haystack import docstrings

    text = "\n".join(docstrings())
    rounds = max(1, round(megabytes * 1e6 / len(text)))
    with file.open("w", encoding="utf-8") as out:
        if file.name == "many.jsonl":
            out.writelines(json.dumps({"text": part}) + "\n" for _ in range(rounds) for part in docstrings())
        elif file.name == "one.jsonl":
            out.write(json.dumps({"text": text * rounds}) + "\n")
        else:
            out.writelines(text for _ in range(rounds))


def peaks_of(files: Sequence[Path], cache: Path) -> list[tuple[int, int]]:
    """For every file, tokenised into the cache and streamed: peak in MB above the start, and the number of windows."""
    command = [sys.executable, "-c", _CHILD, str(cache), *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("peak ")]
    return [(int(megabytes), int(windows)) for _, megabytes, windows in lines]


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Print the peak of every case; returns them by name, in MB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=50.0)
    size = parser.parse_args(argv).megabytes
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / kind for kind in KINDS]
        for file in files:
            write_text(file, size)
        names = [f"{kind}{how}" for kind in KINDS for how in ("", " streamed")]
        for name, (peak, windows) in zip(names, peaks_of(files, Path(folder) / "cache"), strict=True):
            peaks[name] = peak
            megabytes = (Path(folder) / name.split()[0]).stat().st_size / 1e6
            print(f"{name:<20} {megabytes:6.1f} MB, {windows} windows: peak {peak} MB")
    return peaks


if __name__ == "__main__":
    sys.exit(max(main().values()) > LIMIT_MB)
