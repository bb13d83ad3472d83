"""A digest inside a checkpoint: changed bytes are noticed before they are loaded.

A checkpoint of torch is a zip archive; the SHA-256 of its bytes is stored as the archive's comment, which torch
ignores.
"""

import hashlib
import zipfile
import zlib
from pathlib import Path

_MARK = b"learnkv-sha256:"
_LENGTH = len(_MARK) + 64
_END = b"PK\x05\x06"
"""Signature of a zip archive's last record, 22 bytes without its comment."""


def seal(path: Path) -> None:
    """Append the digest to a checkpoint that `torch.save` has just written."""
    with path.open("r+b") as file:
        file.seek(-22, 2)
        end = file.read()
        assert end.startswith(_END), "not a zip archive without a comment"
        file.seek(-2, 2)
        file.write(_LENGTH.to_bytes(2, "little"))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(_MARK + digest.encode())


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes; None where they are what was written.

    Without a digest, the checksums of the archive's parts are compared.
    """
    content = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _LENGTH))
        comment = file.read()
        if not comment.startswith(_MARK):
            return _archive_fault(path)
        file.seek(0)
        for left in range(size - _LENGTH, 0, -(1 << 20)):
            content.update(file.read(min(left, 1 << 20)))
    same = content.hexdigest().encode() == comment.removeprefix(_MARK)
    return None if same else "its bytes have changed since it was written"


def _archive_fault(path: Path) -> str | None:
    """The first part of a zip archive whose checksum differs; None for other files, which torch refuses."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except zipfile.BadZipFile:
        return None
    except (zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"its archive is broken: {error}"
    if archive.comment:
        return "its digest has changed since it was written"
    return None if broken is None else f"its bytes have changed since it was written: {broken}"
