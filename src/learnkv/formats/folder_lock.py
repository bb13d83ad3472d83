"""A lock on an output folder, so that two programs never write into the same one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from learnkv.errors import UserError

LOCK_FILE = ".learnkv.lock"


@contextmanager
def folder_lock(folder: Path, key: str) -> Iterator[None]:
    """Hold the lock of an existing folder in the block; it ends with the process, however that ends.

    File systems without locks are written without one.

    Args:
        folder: folder that can be written.
        key: argument that names the folder, for the error.

    Raises:
        UserError: another program holds it.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"{key}={folder}: another program is writing into this folder; wait for its end, or use another {key}="
        ) from None
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)  # while it is held: a program that opened it before starts over
        lock.release()
