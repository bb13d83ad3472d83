"""What a policy may keep of a prompt: entries or bytes."""

from dataclasses import dataclass

from learnkv.errors import UserError
from learnkv.policy.byte_budget import parse_bytes

EXPECTED = "a fraction above 0 and at most 1, a number of bytes, or text such as 64MB"
_UNITS = ((2**30, "GB"), (2**20, "MB"), (2**10, "KB"))
"""As of `parse_bytes`."""


@dataclass(frozen=True)
class Budget:
    """A budget by one of these.

    Args:
        keep: fraction of the prompt's entries.
        tokens: entries per head on average.
        bytes: fraction (float) of the bytes of the prompt's entries at 16 bits, or a number of bytes (int).
    """

    keep: float | None = None
    tokens: int | None = None
    bytes: float | int | None = None

    def __str__(self) -> str:
        if self.bytes is not None:
            return f"bytes {self.bytes:.12g}" if isinstance(self.bytes, float) else f"bytes {with_unit(self.bytes)}"
        return f"keep {self.keep:.12g}" if self.keep is not None else f"budget {self.tokens}"

    @property
    def order(self) -> tuple[int, float]:
        """Sorts by kind, then the largest first."""
        in_bytes = (self.bytes, None) if isinstance(self.bytes, float) else (None, self.bytes)
        return next((kind, -of) for kind, of in enumerate((self.keep, self.tokens, *in_bytes)) if of is not None)

    def asked_bytes(self, full: float) -> int | None:
        """Bytes of a prompt whose entries at 16 bits take `full` bytes; None for a budget of entries."""
        return int(self.bytes * full) if isinstance(self.bytes, float) else self.bytes

    def fraction(self, entries: int, full: float) -> float:
        """The budget as a fraction of a prompt: of its `entries` tokens, or of its `full` bytes."""
        if self.bytes is not None:
            return self.bytes if isinstance(self.bytes, float) else min(1.0, self.bytes / full)
        return self.keep if self.keep is not None else min(1.0, (self.tokens or 0) / entries)


WHOLE = Budget(keep=1.0)
"""Every entry."""


def with_unit(count: int) -> str:
    """A number of bytes as `bytes=` takes it, exactly: 67,108,864 is 64MB."""
    size, unit = next((of for of in _UNITS if count >= of[0] and count % of[0] == 0), (1, ""))
    return f"{count // size}{unit}"


def bytes_budget(value: float | str) -> Budget:
    """The budget of a value of `bytes=`, as typed or as in YAML.

    Args:
        value: a fraction up to 1, a number of bytes above 1, or text such as 64MB.

    Raises:
        UserError: none of these.
    """
    number = parse_bytes(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not (0 < number <= 1 or (number > 1 and float(number).is_integer())):
        raise UserError(f"bytes={value}: expected {EXPECTED}")
    return Budget(bytes=float(number) if number <= 1 else int(number))
