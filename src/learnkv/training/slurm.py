"""Training as a SLURM job: requeueing with the run's own checkpoint instead of Lightning's.

Lightning writes a requeue checkpoint of its own into the run's folder and resumes from it whatever the command wants.
Here SIGUSR1 (`sbatch --signal=USR1@90`) saves `last.ckpt`, as SIGTERM does, and requeues the job.
"""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from learnkv.errors import Preempted


def plugins(given: Any) -> Any:
    """The Trainer's plugins: those given, or SLURM's environment without requeueing where the process is its task."""
    managed = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if given is None and managed else given


def end_signals() -> tuple[signal.Signals, ...]:
    """Signals after which a run saves and ends."""
    return (signal.SIGTERM, signal.SIGUSR1) if SLURMEnvironment.detect() else (signal.SIGTERM,)


class EarlyEnd:
    """SIGUSR1 while model and data are loaded, noted for the next `check`; an exception would end up in an import.

    Training replaces the handler by one that saves a checkpoint first.
    """

    def __init__(self) -> None:
        self.requested = False

    def _note(self, *_: Any) -> None:
        self.requested = True

    def check(self) -> None:
        """Requeue the job and raise Preempted after the signal."""
        if self.requested:
            raise Preempted(f"ended by SIGUSR1 outside of training; {requeue()}")

    @contextmanager
    def noting(self) -> Iterator["EarlyEnd"]:
        """Note the signal in the block, in a SLURM job."""
        if signal.SIGUSR1 not in end_signals() or threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = signal.signal(signal.SIGUSR1, self._note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGUSR1, previous)


def requeue() -> str:
    """Requeue this job; returns what became of it, for the run's last line."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"[0-9_-]+", job):
        return "the same command resumes it"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "scontrol could not requeue it; the same command resumes it"
    if done.returncode:
        return f"scontrol could not requeue it ({' '.join(done.stderr.split())}); the same command resumes it"
    return f"job {job} is requeued and resumes it"
