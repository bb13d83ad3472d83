"""The parts that a learned policy starts from."""

from typing import Any

from learnkv.core.precision import Precision
from learnkv.precision.uniform import UniformPrecision


def base_part(part: Any) -> Any:
    """A component without its learned correction."""
    return getattr(part, "base", part) if part is not None and any(True for _ in part.parameters()) else part


def base_precision(precision: Precision | None) -> Precision | None:
    """All entries at the reference level of a learned precision."""
    if precision is None or not precision.shares_bytes:
        return precision
    return UniformPrecision(precision.reference.keys, precision.reference.values)
