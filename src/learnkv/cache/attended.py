"""Whether a layer attends to exactly what its cache returned."""

from torch import Tensor

from learnkv.errors import UserError


def check_attended(module: str, passed: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor) -> None:
    """Raise UserError for a layer whose attention reads anything else than keys and values as they were `passed`."""
    if passed is None:
        raise UserError(f"{module} attends twice, or to keys of another layer: learnkv does not support it")
    if passed[0] is not keys or passed[1] is not values:
        raise UserError(f"{module} attends to keys or values that it makes from cached ones: not supported")
    if keys.shape[-1] != values.shape[-1]:
        raise UserError(
            f"{module} has keys of {keys.shape[-1]} channels and values of {values.shape[-1]}: learnkv expects "
            "equally many"
        )
