"""What every benchmark is told on its command line, and the JSON part that it writes."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import Work
from benchmarks.timing import Timing

Row = dict[str, Any]


class Part:
    """Rows of one script, on disk after every one of them: a script that dies or is stopped loses nothing."""

    def __init__(self, out: Path | None, name: str, dry_run: bool) -> None:
        self._out, self._begin = out, time.monotonic()
        self.rows: list[Row] = []
        self.document: dict[str, Any] = {"part": name, "finished": False, "environment": environment(dry_run)}
        self._write()

    def add(self, timing: Timing | str | None = None, work: Work | None = None, **fields: Any) -> Row:
        """Keep a row: what was measured (or, in words, why it was not), and what it had to do at least."""
        row: Row = {key: value for key, value in fields.items() if value is not None}
        if isinstance(timing, Timing):
            row |= {"t_us": timing.us, "t_us_repeat": timing.repeat_us, "how": timing.how}
        elif timing is not None:
            row["failed"] = timing
        if work is not None:
            row |= {"n_launch" if key == "launches" else key: value for key, value in asdict(work).items()}
        self.rows.append(row)
        self._write()
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if k != "traffic"}
        print(f"{time.monotonic() - self._begin:6.1f}s", " ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        return row

    def finish(self) -> None:
        """Say that nothing is missing."""
        self.document["finished"] = True
        self._write()

    def _write(self) -> None:
        if self._out is None:
            return
        self.document["seconds"] = round(time.monotonic() - self._begin, 1)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        partial = self._out.with_suffix(".partial")
        partial.write_text(json.dumps(self.document | {"rows": self.rows}, indent=1), encoding="utf-8")
        os.replace(partial, self._out)


class Clock:
    """Says when a script has to come to its end."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def over(self) -> bool:
        """Whether nothing new should be begun."""
        return time.monotonic() > self._end


def environment(dry_run: bool) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    versions = {}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "sha": revision(),
        "python": platform.python_version(),
        **versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dry_run": dry_run,
    }


def revision() -> str:
    """The commit, from SHA in the environment or from git; "unknown" in a copy without history."""
    if named := os.environ.get("SHA"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(about: str | None, argv: list[str] | None, **extra: dict[str, Any]) -> argparse.Namespace:
    """What every script is told on its command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help="JSON file for the rows; nothing is written without it")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try the script out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after this long")
    for name, options in extra.items():
        parser.add_argument(f"--{name}", **options)
    return parser.parse_args(argv)


def device(dry_run: bool) -> torch.device:
    """Where to measure; anything but a dry run needs a GPU."""
    if not dry_run and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; --dry-run tries the script out on the CPU")
    if dry_run and os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported, long before this line
        sys.exit("error: --dry-run needs TRITON_INTERPRET=1 in the environment")
    return torch.device("cpu" if dry_run else "cuda")
