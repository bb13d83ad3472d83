"""Install into the environment of the Python that runs this: with uv where that is the same, otherwise with pip.

VENV/bin/python tools/install.py -c constraints.txt -e '.[dev]'      arguments of `pip install` that uv has too

uv takes seconds where pip takes minutes, and environments share its files. It knows no setting of pip: where pip is
told of another index than the default, and wherever uv is missing or fails, pip does the work. torch is installed
before, by pip: of its builds the configured sources may offer one that uv does not know of.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip"]
QUIET = ["--disable-pip-version-check", "--no-input"]
OTHER_SOURCES = ("index-url", "no-index")


def sources_of(settings: str) -> set[str]:
    """The sources, among `OTHER_SOURCES`, that the output of `pip config list` sets to something."""
    lines = (line.partition("=")[::2] for line in settings.splitlines())
    values = {key.rpartition(".")[2]: value for key, value in lines}
    return {key for key in OTHER_SOURCES if key in values and ast.literal_eval(values[key]) not in ("", "0", "false")}


def find_uv() -> str | None:
    """Path of uv: a given one, or the package installed into this environment; None where there is none."""
    own = Path(sys.executable).with_name("uv")
    if not own.exists() and shutil.which("uv") is None:
        subprocess.run([*PIP, "install", *QUIET, "--quiet", "uv"], stdin=subprocess.DEVNULL)
    return str(own) if own.exists() else shutil.which("uv")


def main(words: list[str]) -> int:
    """Install what the words ask for; the exit code of the program that did it."""
    settings = subprocess.run([*PIP, "config", "list"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if settings.returncode == 0 and not sources_of(settings.stdout) and (uv := find_uv()):
        done = subprocess.run([uv, "pip", "install", "--python", sys.executable, *words], stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return 0
        print("uv failed: pip installs instead", file=sys.stderr)
    return subprocess.run([*PIP, "install", *QUIET, *words], stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
