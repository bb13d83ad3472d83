"""All kept entries in the same number of bits."""

import re
from collections.abc import Mapping

from learnkv.codecs.float16 import Float16
from learnkv.codecs.per_token import PerToken
from learnkv.core.codec import Codec
from learnkv.core.precision import Level, Precision
from learnkv.errors import UserError

BITS = (16, 8, 4, 3, 2)


class UniformPrecision(Precision):
    """Keys and values of all kept entries as two codecs store them.

    Args:
        keys: bits (16, 8, 4, 3, 2; codes per entry after a Hadamard rotation, see `codecs.PerToken`) or a codec.
        values: the same.
    """

    def __init__(self, keys: Codec | int = 4, values: Codec | int = 4) -> None:
        super().__init__()
        self.keys, self.values = codec_of(keys, "keys"), codec_of(values, "values")
        self.label = _label(keys, values)

    @property
    def levels(self) -> tuple[Level, ...]:
        return (Level(self.keys, self.values),)


def as_precision(precision: Precision | int | Mapping[str, int] | None) -> Precision | None:
    """A precision from bits, or from bits of keys and values by name.

    Raises:
        UserError: for bits or names that there are not.
    """
    if precision is None or isinstance(precision, Precision):
        return precision
    if isinstance(precision, int):
        return UniformPrecision(precision, precision)
    if not isinstance(precision, Mapping) or set(precision) != {"keys", "values"}:
        raise UserError(f"precision={precision}: expected bits such as 4, or {{keys: 4, values: 3}}")
    return UniformPrecision(precision["keys"], precision["values"])


def codec_of(bits: Codec | int, name: str) -> Codec:
    """The codec of entries with this many bits per number.

    Raises:
        UserError: for bits that no codec has, or a codec that stores keys before RoPE.
    """
    if isinstance(bits, Codec):
        if bits.before_rope:
            raise UserError(f"{name}: {bits.name} stores keys before RoPE, the cache has them after it")
        return bits
    if bits not in BITS or isinstance(bits, bool):
        raise UserError(f"precision: {name}={bits!r}: expected {', '.join(map(str, BITS))} bits")
    return Float16() if bits == 16 else PerToken(bits)


def pair_of(text: str) -> tuple[int, int]:
    """Bits of keys and values: `K4V3`, or `4` for both."""
    match = re.fullmatch(r"K(\d+)V(\d+)|(\d+)", text)
    if match is None:
        raise UserError(f"precision={text}: expected bits such as 4 or K4V3")
    keys, values, both = match.groups()
    return int(both or keys), int(both or values)


def _label(keys: Codec | int, values: Codec | int) -> str:
    if isinstance(keys, int) and keys == values:
        return str(keys)
    return f"K{_word(keys)}V{_word(values)}"


def _word(bits: Codec | int) -> str:
    return bits.name if isinstance(bits, Codec) else str(bits)
