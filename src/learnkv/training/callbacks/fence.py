"""Fences around loggers and pictures: their failure is one line of warning and never costs a trained policy."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger


@contextmanager
def fenced(what: str) -> Iterator[None]:
    """Turn an exception of the block into a line on stderr that begins with `what`."""
    try:
        yield
    except Exception as error:  # whatever a logger raises
        _warn(what, error)


class FencedLogger(Logger):
    """A logger whose exceptions are reported once and do not reach the training.

    Args:
        what: its name in the warning.
        make: makes the logger.
        gives_up: whether it is left out after its first exception; else it is tried again, silently.
    """

    def __init__(self, what: str, make: Callable[[], Logger], gives_up: bool = True) -> None:
        super().__init__()
        self.what, self.gives_up = what, gives_up
        self.logger: Logger | None = None
        self._has_warned = False
        with fenced(what):
            self.logger = make()

    def attempt(self, use: Callable[[Any], Any]) -> Any:
        """The result of `use(logger)`; None where that fails or there is no logger any more."""
        if self.logger is None:
            return None
        try:
            return use(self.logger)
        except Exception as error:  # whatever a logger raises
            if not self._has_warned:
                _warn(self.what, error)
            self._has_warned = True
            self.logger = None if self.gives_up else self.logger
            return None

    @property
    def name(self) -> str:
        return self.what

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.attempt(lambda logger: logger.log_metrics(dict(metrics), step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda logger: logger.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self.attempt(lambda logger: logger.save())

    def finalize(self, status: str) -> None:
        self.attempt(lambda logger: logger.finalize(status))


def _warn(what: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"warning: {what} failed ({reason}); the training goes on without it", file=sys.stderr)
