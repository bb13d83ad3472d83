"""What it is worth that freed memory is kept: `python -m benchmarks.freed_memory [--model smollm2] [--rounds 2]`.

CPU seconds of reading two prompts of 640 tokens, the least of three times in a process of its own, with and without.
"""

import argparse
import subprocess
import sys

CHILD = """
import sys, time, torch
from learnkv import load_model, prefill
from learnkv.cli.allocator import keep_freed_memory
if sys.argv[2] == "kept":
    assert keep_freed_memory(), "expected glibc"
model, _ = load_model(sys.argv[1], device="cpu")
ids = torch.randint(0, 1000, (2, 640), generator=torch.Generator().manual_seed(0))
times = []
for _ in range(3):
    begin = time.process_time()
    prefill(model, ids)
    times.append(time.process_time() - begin)
print(min(times))
"""


def main() -> None:
    """Print the seconds of every round, interleaved, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"given back": [], "kept": []}
    for _ in range(given.rounds):
        for how, found in seconds.items():
            words = [sys.executable, "-c", CHILD, given.model, how]
            found.append(float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout))
            print(f"{how}: {found[-1]:.2f} s of CPU", flush=True)
    print(f"kept over given back: {min(seconds['kept']) / min(seconds['given back']):.2f}")


if __name__ == "__main__":
    main()
