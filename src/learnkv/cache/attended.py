"""Whether a layer attends to exactly what its cache returned, and goes on with tokens of the same model."""

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


def sizes_of(keys: Tensor, values: Tensor) -> tuple[int, int, int]:
    """Kv heads, channels of keys and channels of values [B, H, T, D]."""
    return keys.shape[1], keys.shape[3], values.shape[3]


def check_continues(keys: Tensor, values: Tensor, rows: int, sizes: tuple[int, int, int]) -> None:
    """Raise UserError unless keys and values [B, H, T, D] are further tokens of `rows` prompts of these sizes."""
    if keys.shape[0] != rows:
        raise UserError(f"{keys.shape[0]} rows continue {rows} prompts: repeat the cache's rows first")
    if (new := sizes_of(keys, values)) != sizes:
        raise UserError(f"{new} kv heads and channels continue a prompt of {sizes}: not the same model")
