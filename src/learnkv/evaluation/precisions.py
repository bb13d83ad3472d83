"""`precision=`: methods without training at given precisions, beside the whole cache at each of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from learnkv.errors import UserError
from learnkv.evaluation.results import FULL
from learnkv.persistence.hub import is_repository
from learnkv.policy.policy import Policy
from learnkv.precision.fixed_tiers import FixedTiers, tiers_of
from learnkv.precision.uniform import BITS, pair_of

AS_IS = 16
"""Precision at which the whole cache is the full cache, which is always compared."""


def parse_precision(value: int | str) -> int | dict[str, int] | FixedTiers:
    """Bits of keys and values alike, or of each, or tiers.

    Args:
        value: 16, 8, 4, 3 or 2, or `K4V3`, or shares of the kept entries at such levels: `K4V2:0.75+K8V3:0.25`.

    Raises:
        UserError: anything else.
    """
    if (tiers := tiers_of(str(value).upper())) is not None:
        return tiers
    keys, values = pair_of(str(value).upper())
    if not {keys, values} <= set(BITS):
        raise UserError(f"precision={value}: expected {', '.join(map(str, BITS))} bits, or K4V3 for keys and values")
    return keys if keys == values else {"keys": keys, "values": values}


def without_precision(path: str) -> tuple[str, str | None]:
    """A policy's path and the precision that follows it, as in `smollm2@K4V3`; None where none does.

    `owner/name@revision` on the hub, and a file whose name has an `@`, are paths without a precision.
    """
    base, _, precision = path.rpartition("@")
    if not base or is_repository(path) or Path(path).expanduser().exists():
        return path, None
    return base, precision


def check_precisions(precisions: Sequence[int | str], key: str = "precision") -> None:
    """Raise UserError for a precision that there is not, and for one that is given twice."""
    named = [_label(parse_precision(value)) for value in precisions]
    if len(set(named)) < len(named):
        raise UserError(f"{key}={','.join(map(str, precisions))}: expected different ones")


def at_precisions(policies: Mapping[str, Policy], precisions: Iterable[int | str]) -> dict[str, Policy]:
    """Every policy at every precision, called `kvzip@4`.

    The full cache is left out at 16 bits, where it is compared anyway, and in tiers.

    Raises:
        UserError: a policy that cannot have one of them, by name.
    """
    named = {}
    for precision in precisions:
        for name, policy in policies.items():
            if name == FULL and (":" in str(precision) or parse_precision(precision) == AS_IS):
                continue
            try:
                named[f"{name}@{str(precision).upper()}"] = at_precision(policy, precision)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    return named


def _label(precision: int | dict[str, int] | FixedTiers) -> str:
    return precision.label if isinstance(precision, FixedTiers) else str(precision)


def at_precision(policy: Policy, precision: int | str) -> Policy:
    """A policy with such a precision in place of its own."""
    return policy.with_precision(parse_precision(precision))
