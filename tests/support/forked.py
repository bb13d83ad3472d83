"""A function in a fork of this process.

Most of a short program's time are its imports, which a fork has made already.
"""

import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch


class Done(NamedTuple):
    """How a fork ended."""

    code: int
    out: str
    err: str


class Fork:
    """Runs `work` at once, as a program of its own would: seeded, with one thread, its output in files.

    Args:
        work: its result is the exit code, None is 0.
        folder: current folder of the fork; also where its output goes.
        environment: further variables; what was read of the environment when a module was imported stays.
    """

    def __init__(self, work: Callable[[], int | None], folder: Path, **environment: str) -> None:
        streams = Path(tempfile.mkdtemp(dir=folder))
        self._streams = [streams / "out", streams / "err"]
        self._pid = os.fork()
        if self._pid == 0:
            self._run(work, folder, environment)

    def _run(self, work: Callable[[], int | None], folder: Path, environment: dict[str, str]) -> NoReturn:
        code = 1
        try:
            for number, file in enumerate(self._streams, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            os.environ.update(environment)
            os.chdir(folder)
            tempfile.tempdir = None
            torch.set_num_threads(1)  # threads of the process that was forked are not there
            random.seed(0)
            torch.manual_seed(0)
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 300) -> Done:
        """Its end; it is killed after so many seconds."""
        begin, status = time.monotonic(), (0, 0)
        while status[0] == 0 and time.monotonic() - begin < seconds:
            status = os.waitpid(self._pid, os.WNOHANG)
            time.sleep(0.01)
        if status[0] == 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            status = os.waitpid(self._pid, 0)
        out, err = (file.read_text(encoding="utf-8") for file in self._streams)
        return Done(os.waitstatus_to_exitcode(status[1]), out, err)


def run_program(file: Path, folder: Path) -> str:
    """What a program prints that is run in `folder`, away from the repository, of which it may import nothing."""
    repository = Path(__file__).parents[2]

    def run() -> None:
        inside = (repository, repository / "tests")
        sys.path[:] = [str(folder), *(path for path in sys.path if Path(path).resolve() not in inside)]
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_DATASETS_CACHE = str(folder / "datasets")
        sys.argv = [str(file)]
        runpy.run_path(str(file), run_name="__main__")

    done = Fork(run, folder, TMPDIR=str(folder), HF_DATASETS_CACHE=str(folder / "datasets")).wait()
    assert done.code == 0, done.err
    return done.out
