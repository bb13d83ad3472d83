"""What changes a run's numbers, without the paths it was read from: a run may be resumed from another place."""

from collections.abc import Mapping
from typing import Any

from learnkv.data.text import text_contents
from learnkv.formats.files import content_digest, folder_digest
from learnkv.inference.models import local_folder
from learnkv.training.start import start_digest

MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
"""Endings of the files that a model is loaded from."""


def contents_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the keys that name files, with a file's hash in place of its path.

    Args:
        keys: all keys of a run as plain containers.

    Raises:
        UserError: a text, model or start policy that does not exist.
    """
    return {
        "text": text_contents(keys["text"]),
        "model": _model(str(keys["model"])),
        "start": start_digest(keys["start"]),
        "policy": _by_content(keys["policy"]),
        "objective": _by_content(keys["objective"]),
    }


def _model(name: str) -> str:
    """A model's name, or the hash of its folder's files."""
    folder = None if name == "reference" else local_folder(name)
    return name if folder is None else folder_digest(folder, MODEL_FILES)


def _by_content(value: Any) -> Any:
    """Nested arguments with the hash of every file and folder that they name."""
    if isinstance(value, Mapping):
        return {key: _by_content(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(part) for part in value]
    return content_digest(value) or value if isinstance(value, str) else value
