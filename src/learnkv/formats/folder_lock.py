"""Locks on files and output folders, so that two programs never write into the same one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from learnkv.errors import UserError

LOCK_FILE = ".learnkv.lock"


@contextmanager
def file_lock(file: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file in the block; it ends with the process, however that ends.

    File systems without locks are written without one.

    Args:
        file: in a folder that can be written.
        busy: called where another program holds it; raises, or returns to wait.
    """
    lock = FileLock(file)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            busy()
            lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is held: a program that opened it before starts over
        lock.release()


@contextmanager
def folder_lock(folder: Path, key: str) -> Iterator[None]:
    """Hold the lock of an existing folder in the block.

    Args:
        folder: folder that can be written.
        key: argument that names the folder, for the error.

    Raises:
        UserError: another program holds it.
    """

    def refuse() -> None:
        raise UserError(
            f"{key}={folder}: another program is writing into this folder; wait for its end, or use another {key}="
        ) from None

    with file_lock(folder / LOCK_FILE, refuse):
        yield
