"""Processes that share out the batches of one evaluation: those of torchrun, or those that `devices=N` starts.

They talk through a key-value store alone. The first one writes what people read; the others measure.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed

from learnkv.errors import RunError, UserError

distributed: Any = torch.distributed  # its stub lacks the stores
HOST = "127.0.0.1"
POLL = 0.05
"""Seconds between two looks at the store."""
LAST_SECONDS = 30
"""Time that a finished process has to end."""
_ERRORS: dict[str, type[Exception]] = {"UserError": UserError, "RunError": RunError}


class Processes:
    """This process among those of an evaluation; alone unless it is given others.

    Args:
        number: of this process, from 0.
        count: of all processes.
        local: number of this process on its machine.
        store: key-value store of all processes; None: one of its own.
        started: processes that this one started, numbers 1 and above.
    """

    def __init__(
        self,
        number: int = 0,
        count: int = 1,
        local: int = 0,
        store: Any = None,
        started: Sequence[BaseProcess] = (),
    ) -> None:
        self.number, self.count, self.local, self.started = number, count, local, started
        self.store = distributed.HashStore() if store is None else store

    @property
    def is_first(self) -> bool:
        """Whether this process writes results and reports errors."""
        return self.number == 0

    @property
    def shard(self) -> int | None:
        """Number of the file that this process writes its samples to; None for one process."""
        return self.number if self.count > 1 else None

    def device(self, asked: str) -> str:
        """The device of this process: a GPU of its own where there are GPUs.

        Raises:
            UserError: more processes than GPUs, or one device that several would share.
        """
        if self.count == 1 or asked == "cpu":
            return asked
        if asked not in ("auto", "cuda"):
            raise UserError(f"device={asked}: expected auto, cuda or cpu for {self.count} processes")
        gpus = torch.cuda.device_count()
        if gpus == 0:
            return asked
        if self.local >= gpus:
            raise UserError(f"{self.count} processes: expected a GPU for each, this machine has {gpus}; or device=cpu")
        return f"cuda:{self.local}"

    def shared(self, total: int) -> Iterator[int]:
        """Numbers below `total`, each yielded by one process, the next one to whichever asks first."""
        while (number := self.store.add("next", 1) - 1) < total:
            self.check()
            yield number

    def after_first(self, action: Callable[[], None]) -> None:
        """Run `action` on the first process; the others wait for its end."""
        if self.is_first:
            action()
            self.store.set("prepared", "")
        else:
            self._wait("prepared")

    def meet(self) -> None:
        """Wait until every process is here."""
        self.store.set(f"here {self.number}", "")
        for number in range(self.count):
            self._wait(f"here {number}")

    def finish(self, lines: Sequence[str]) -> list[str]:
        """The lines of all processes, on the first one, when all are finished; on the others none."""
        self.store.set(f"finished {self.number}", json.dumps(list(lines)))
        if not self.is_first:
            return []
        for number in range(self.count):
            self._wait(f"finished {number}")
        return [line for number in range(self.count) for line in json.loads(self.store.get(f"finished {number}"))]

    def fail(self, error: Exception) -> None:
        """Let all processes stop after their batch, and the first one raise this UserError or RunError."""
        kind = "UserError" if isinstance(error, UserError) else "RunError"
        self.store.set("failed", json.dumps([kind, str(error) or type(error).__name__]))

    def check(self) -> None:
        """Raise the error of another process, RunError where one that this process started has ended early."""
        if self.store.check(["failed"]):
            kind, message = json.loads(self.store.get("failed"))
            raise _ERRORS[kind](message)
        for number, process in enumerate(self.started, 1):
            if process.exitcode is not None and not self.store.check([f"finished {number}"]):
                raise RunError(f"process {number} of {self.count} ended early with exit code {process.exitcode}")

    def _wait(self, key: str) -> None:
        while not self.store.check([key]):
            self.check()
            time.sleep(POLL)


@contextmanager
def processes(devices: int, assist: Callable[[Any, Processes], None], config: Any) -> Iterator[Processes]:
    """This process among those of the evaluation: torchrun's, or `devices` of which this one is the first.

    Args:
        devices: the key `devices=`.
        assist: what a process that is started here does, with `config`.

    Raises:
        UserError: torchrun has another number of processes than `devices`.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        group = _of_torchrun(devices)
    elif devices > 1:
        group = _start(devices, assist, config)
    else:
        group = Processes()
    try:
        yield group
        for process in group.started:
            process.join(LAST_SECONDS)
    except Exception as error:
        group.fail(error)
        raise
    finally:
        for process in group.started:
            process.terminate()


@contextmanager
def reporting(group: Processes) -> Iterator[None]:
    """The block of a process that is not the first: its error is raised by the first, and it prints nothing."""
    # A lost store: the first process has ended, and has reported why.
    with suppress(distributed.DistError, KeyboardInterrupt):
        try:
            with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing):
                yield
        except (UserError, RunError, OSError) as error:
            group.fail(error)


def _of_torchrun(devices: int) -> Processes:
    count = int(os.environ["WORLD_SIZE"])
    if devices not in (1, count):
        raise UserError(f"devices={devices}: expected the number of torchrun's processes, {count}")
    if count == 1:
        return Processes()
    try:
        store, number, _ = next(distributed.rendezvous("env://"))
    except (ValueError, distributed.DistError) as error:
        raise UserError(f"WORLD_SIZE={count}: expected the environment of torchrun ({error})") from None
    return Processes(number, count, int(os.environ.get("LOCAL_RANK", number)), store)


def _start(devices: int, assist: Callable[[Any, Processes], None], config: Any) -> Processes:
    """Start the other processes; the threads of a CPU are shared out."""
    threads = max(1, torch.get_num_threads() // devices)
    torch.set_num_threads(threads)
    store = distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_assist, args=(store.port, number, devices, threads, assist, config), daemon=True)
        for number in range(1, devices)
    ]
    for process in started:
        process.start()
    return Processes(0, devices, 0, store, started)


def _assist(
    port: int, number: int, count: int, threads: int, assist: Callable[[Any, Processes], None], config: Any
) -> None:
    torch.set_num_threads(threads)
    assist(config, Processes(number, count, number, distributed.TCPStore(HOST, port, is_master=False)))
