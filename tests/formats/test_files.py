"""Files are replaced as a whole or not at all, and a path that cannot be written is one line."""

from pathlib import Path

import pytest

from learnkv.errors import UserError
from learnkv.formats.files import atomic_write, make_folder, output_file, write_text


def _fail_within(file: Path) -> None:
    with atomic_write(file) as part:
        part.write_text("newer")
        raise RuntimeError("halfway")


def test_a_file_is_replaced_at_the_end_and_kept_on_an_error(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    with atomic_write(file) as part:
        part.write_text("new")
        assert part.suffix == file.suffix
        assert not file.exists()
    assert file.read_text() == "new"
    with pytest.raises(RuntimeError, match="halfway"):
        _fail_within(file)
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_folders_are_created_and_files_are_no_folders(tmp_path: Path) -> None:
    assert write_text(tmp_path / "deep" / "a.txt", "a").read_text() == "a"
    assert make_folder(tmp_path / "deep" / "er", "output").is_dir()
    with pytest.raises(UserError, match=r"output=.*a.txt: expected a folder that can be written"):
        make_folder(tmp_path / "deep" / "a.txt", "output")
    with pytest.raises(UserError, match=r"a.txt/b: cannot be written"), output_file(tmp_path / "deep" / "a.txt" / "b"):
        raise AssertionError
    with pytest.raises(UserError, match="deep: cannot be written"):
        write_text(tmp_path / "deep", "a folder")
