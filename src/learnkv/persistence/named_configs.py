"""YAML files of the package, by name."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from learnkv.errors import UserError
from learnkv.formats.files import read_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next((p for p in (_PACKAGE / "configs", _PACKAGE.parents[1] / "configs") if p.is_dir()), _PACKAGE / "configs")
"""Folder of the YAML files: inside the package in an installed wheel, at the root in a checkout."""


_MAX_EXTENDED = 16


def find_config(kind: str, name: str, key: str = "config") -> Path:
    """The YAML file of `key=name`: a path, or the bare name of a file in `configs/<kind>/` or below it.

    A file may extend another one by its key `config`, a path relative to the file; its own keys replace that one's,
    nested ones as a whole.

    Raises:
        UserError: there is no such file; with the nearest name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    names = config_names(kind)
    if name in names:
        return CONFIGS / kind / f"{name}.yaml"
    shipped = "reference, smollm2 or smollm2-text (the trained policies of this package)"
    trained = f"a checkpoint, an exported folder, {shipped}, " if key == "ckpt" else ""
    raise UserError(
        f"{key}={name}: expected {trained}a YAML file or one of: {', '.join(names)}{nearest(path.stem, names)}"
    )


def checked_config(kind: str, name: str) -> Path:
    """`find_config`, read within the limits of `read_yaml`, as are the files that it extends.

    Raises:
        UserError: no such file, a file that cannot be read, or one that extends itself.
    """
    path = file = find_config(kind, name)
    for _ in range(_MAX_EXTENDED):
        try:
            content = read_yaml(file)
        except UserError as error:
            raise UserError(f"config={name}: {str(error).removeprefix(f'{name}: ')}") from None
        base = content.get("config") if isinstance(content, dict) else None
        if not isinstance(base, str):
            return path
        file = file.parent / base
    raise UserError(f"config={name}: extends more than {_MAX_EXTENDED} files, or itself")


def config_names(kind: str) -> list[str]:
    """Names of the YAML files in `configs/<kind>/` and below it."""
    folder = CONFIGS / kind
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def nearest(name: str, names: Sequence[str]) -> str:
    """The question "; did you mean X?" for a mistyped name; empty where no name is similar."""
    similar = difflib.get_close_matches(name, names, 1) or [k for k in names if k.endswith(f".{name}")]
    return f"; did you mean {similar[0]}?" if similar else ""
