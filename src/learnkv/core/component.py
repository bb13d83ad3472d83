"""Modules that record their constructor arguments, so that a policy can be exported as readable YAML."""

import functools
import inspect
from typing import Any, Literal

from torch import nn

Status = Literal["numbers", "port", "description", "abstract"]
"""What a method was made from here, the surest first: the published code, whose numbers it gives; somebody else's code,
whose numbers it gives; a description; an abstract."""


class Component(nn.Module):
    """Base of scorers, allocators and policies: the constructor's signature is the configuration's schema."""

    status: Status | None = None
    """What the method was made from; None: it is no published method."""
    table_argument: str = ""
    """Constructor argument that names a table calibrated for one model; empty: the component reads none."""
    trained: bool = False
    """Whether the table was trained by gradient descent."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording_arguments(cls.__init__)  # type: ignore[method-assign]

    @property
    def name(self) -> str:
        """Name of the class, in messages."""
        return type(self).__name__

    def spec(self) -> dict[str, Any]:
        """The constructor's arguments as plain containers; components become `{class_path, init_args}`."""
        return {name: _plain(value) for name, value in self.__dict__.get("_arguments", {}).items()}


def class_path(component: Component) -> str:
    """Import path of the class; the package's public name where it exports one."""
    kind = type(component)
    package = kind.__module__.rpartition(".")[0]
    exported = bool(package) and hasattr(__import__(package, fromlist=["_"]), kind.__name__)
    return f"{package if exported else kind.__module__}.{kind.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return {"class_path": class_path(value), "init_args": value.spec()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _recording_arguments(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Component, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        recorded = dict(list(bound.arguments.items())[1:])
        init(self, *args, **kwargs)
        if type(self).__init__ is wrapped:  # not the call of a base class from below
            self.__dict__["_arguments"] = recorded

    return wrapped
