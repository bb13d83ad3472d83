"""One program per output folder."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.forked import Fork

from learnkv.errors import UserError
from learnkv.formats.folder_lock import file_lock, folder_lock


def test_the_second_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "output"):
        second = folder_lock(tmp_path, "output")
        with pytest.raises(UserError, match=r"output=.*: another program is writing into this folder"), second:
            raise AssertionError
        (tmp_path / "other").mkdir()
        with folder_lock(tmp_path / "other", "output"):
            pass
    with folder_lock(tmp_path, "output"):
        pass


def test_it_ends_with_a_killed_process(tmp_path: Path) -> None:
    def killed() -> None:
        with folder_lock(tmp_path, "output"):
            os._exit(9)

    assert Fork(killed, tmp_path).wait().code == 9
    with folder_lock(tmp_path, "output"):
        pass


def test_a_file_system_without_locks_is_written_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("learnkv.formats.folder_lock.FileLock.acquire", fail)
    with folder_lock(tmp_path, "output"):
        pass


def test_whoever_waits_goes_on_after_the_first(tmp_path: Path) -> None:
    order, waiting = [], threading.Event()

    def second() -> None:
        with file_lock(tmp_path / "lock", waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with file_lock(tmp_path / "lock", lambda: None):
        thread.start()
        assert waiting.wait(30)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
