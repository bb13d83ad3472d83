"""Scores and budgets that are not numbers: found without a host sync on a GPU, raised at the next one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.errors import UserError

READ_AT_ONCE = {"cpu"}
"""Devices of which the host reads values without waiting."""


class Invalid(NamedTuple):
    """The heads in which a component gave values that are not numbers."""

    heads: Tensor
    """[L, B, H] True where there is one."""
    values: str
    """What is not a number, and of which component."""
    first: int
    """Index of the first of these layers."""


def without_nan(values: Tensor, name: str, invalid: list[Invalid], first: int = 0) -> Tensor:
    """The values [L, B, H] or [L, B, H, S], where on a CPU NaN raises; on a GPU it is noted in `invalid` and becomes 0.

    Args:
        name: what the values are, and of which component.
        first: index of their first layer.

    Raises:
        UserError: for NaN on a CPU, with component, layer and head.
    """
    if values.device.type == "meta":
        return values
    # Scores have infinite ones for entries that are protected or absent, budgets have none.
    heads = ~values.isfinite() if values.ndim == 3 else values.isnan().any(-1)
    noted = Invalid(heads, name, first)
    if values.device.type in READ_AT_ONCE:
        refuse_invalid([noted])
        return values
    invalid.append(noted)
    return values.masked_fill(heads if values.ndim == 3 else values.isnan(), 0)


def refuse_invalid(invalid: Sequence[Invalid]) -> None:
    """Raise UserError for the first head with values that are not numbers; one host sync.

    Raises:
        UserError: with component, layer and head.
    """
    if not invalid:
        return
    flags = torch.stack([part.heads.any() for part in invalid]).tolist()
    for part, flag in zip(invalid, flags, strict=True):
        if flag:
            layer, row, head = part.heads.nonzero()[0].tolist()
            raise UserError(
                f"{part.values} are not finite numbers in layer {part.first + layer}, head {head} (row {row})"
            )


def any_invalid(invalid: Sequence[Invalid], device: torch.device) -> Tensor:
    """Whether any head has values that are not numbers, a 0-dimensional tensor of bool; no host sync."""
    flags = [part.heads.any().to(device) for part in invalid]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=device)


def check_shape(values: object, expected: Sequence[int], name: str, letters: str) -> None:
    """Raise UserError for values that are no tensor of real numbers of shape `expected`, its dimensions `letters`."""
    if not isinstance(values, Tensor):
        raise UserError(f"{name}: got {type(values).__name__}, expected a tensor {letters}")
    if values.is_complex() or values.layout != torch.strided:
        raise UserError(f"{name}: got {values.dtype} in {values.layout}, expected real numbers in torch.strided")
    if tuple(values.shape) != tuple(expected):
        raise UserError(f"{name}: got shape {list(values.shape)}, expected {letters} = {list(expected)}")
