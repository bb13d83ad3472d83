"""The command line that gives a configuration."""

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any


def typed_command(command: str, config: Any) -> str:
    """The command with every key whose value is not the default.

    Args:
        command: such as `learnkv eval`.
        config: instance of a dataclass whose fields have defaults that do not change, or are such dataclasses.
    """
    return " ".join([command, *map(shlex.quote, _words(config, ""))])


def _words(config: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _words(value, f"{prefix}{field.name}.")
        elif value != field.default:
            typed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            yield f"{prefix}{field.name}={typed}"
