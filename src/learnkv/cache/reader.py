"""The model that reads a cache."""

import weakref
from typing import Any


class Reader:
    """A reference that does not keep the model alive: copies of a cache share it, pickled ones have none.

    Args:
        model: the model; None: unknown.
    """

    def __init__(self, model: Any = None) -> None:
        self._model = None if model is None else weakref.ref(model)

    def __call__(self) -> Any:
        """The model; None where it is unknown or gone."""
        return None if self._model is None else self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Reader":
        return self

    def __reduce__(self) -> tuple[type["Reader"], tuple[()]]:
        return Reader, ()
