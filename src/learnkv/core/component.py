"""Modules that know how they were made, so that what trains can be exported as a YAML a person can read."""

import functools
import inspect
from typing import Any

from torch import nn


class Component(nn.Module):
    """Base of scorers, allocators and policies: the constructor's signature is the configuration's schema."""

    table_argument: str = ""
    """Constructor argument that names a table calibrated for one model; empty: the component reads none."""
    trained: bool = False
    """Whether the table was trained by gradient descent."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments as plain containers; components become `{class_path, init_args}`."""
        return {name: _plain(value) for name, value in self.__dict__.get("_made_with", {}).items()}


def class_path(component: Component) -> str:
    """Where the class is found, by its public name where the package above exports it."""
    kind = type(component)
    package = kind.__module__.rpartition(".")[0]
    exported = bool(package) and hasattr(__import__(package, fromlist=["_"]), kind.__name__)
    return f"{package if exported else kind.__module__}.{kind.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return {"class_path": class_path(value), "init_args": value.spec()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _remembering(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Component, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        made_with = dict(list(bound.arguments.items())[1:])
        init(self, *args, **kwargs)
        if type(self).__init__ is wrapped:  # not the call of a base class from below
            self.__dict__["_made_with"] = made_with

    return wrapped
