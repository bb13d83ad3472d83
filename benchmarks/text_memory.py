"""Peak memory of reading and tokenising a large text file: `python -m benchmarks.text_memory --megabytes 50`.

Every case is a process of its own: one document as plain text, one as a JSON line, and many JSON lines, tokenised into
`datasets`' cache or streamed. Prints the peak resident memory above that of the process with the tokenizer loaded, from
Linux's VmHWM: `ru_maxrss` would begin with the memory of the process that started it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("one.txt", "one.jsonl", "many.jsonl")
LIMIT_MB = 1500
"""Most that any case may need."""

_CHILD = """
import sys, datasets, transformers
from learnkv.data.text import text_windows
from learnkv.inference.models import REFERENCE
file, streaming, cache = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
datasets.config.HF_DATASETS_CACHE = cache
tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE)
def kilobytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":"))
before = kilobytes("VmRSS")
windows = text_windows(file, tokenizer, 1152, streaming=streaming)
count = sum(1 for _ in windows)
print(round((kilobytes("VmHWM") - before) * 1024 / 1e6), count)
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


def peak(file: Path, streaming: bool, cache: Path) -> tuple[int, int]:
    """Peak in MB above the start, and the number of windows."""
    command = [sys.executable, "-c", _CHILD, str(file), str(streaming), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    megabytes, windows = done.stdout.split()[-2:]
    return int(megabytes), int(windows)


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Print the peak of every case; returns them by name, in MB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=50.0)
    size = parser.parse_args(argv).megabytes
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            file = Path(folder) / kind
            write_text(file, size)
            for streaming in (False, True):
                name = f"{kind}{' streamed' if streaming else ''}"
                peaks[name], windows = peak(file, streaming, Path(folder) / "cache")
                print(f"{name:<20} {file.stat().st_size / 1e6:6.1f} MB, {windows} windows: peak {peaks[name]} MB")
    return peaks


if __name__ == "__main__":
    sys.exit(max(main().values()) > LIMIT_MB)
