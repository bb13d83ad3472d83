"""YAML files that ship with the package, found by their bare names."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from learnkv.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next((p for p in (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs") if p.is_dir()), _PACKAGE / "configs")
"""Folder of our YAML files: inside the package in an installed wheel, at the root in a checkout."""


def find_config(kind: str, name: str, key: str = "config") -> Path:
    """The YAML file that `key=name` means: a path, or the bare name of a file in `configs/<kind>/` or below it.

    A file may name another one as its `config`, by a path that begins where it lies; its own keys replace
    that one's, nested ones as a whole.

    Raises UserError, with the nearest known name, where there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = config_names(kind)
    if name in known:
        return CONFIGS / kind / f"{name}.yaml"
    trained = (
        "a checkpoint, an exported folder, reference (the trained policy of this package), " if key == "ckpt" else ""
    )
    raise UserError(
        f"{key}={name}: expected {trained}a YAML file or one of: {', '.join(known)}{nearest(path.stem, known)}"
    )


def config_names(kind: str) -> list[str]:
    """Names of the YAML files in `configs/<kind>/` and below it."""
    folder = CONFIGS / kind
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean X?" for a mistyped name, nothing where no known one is near."""
    near = difflib.get_close_matches(name, known, 1) or [k for k in known if k.endswith(f".{name}")]
    return f"; did you mean {near[0]}?" if near else ""
