"""What an operation must do at least: bytes to move, floating-point operations, kernels to launch.

Letters as in the package: B batch, H kv heads, G query heads per kv head, D head dimension, S entries of the prompt,
W queries of the observation window. Every function counts inputs once and outputs once.
"""

from dataclasses import dataclass

HALF, SINGLE, INDEX = 2, 4, 8
"""Bytes of a bfloat16, a float32 and an int64."""


@dataclass(frozen=True)
class Work:
    """The least that has to be done, and over which ceiling."""

    bytes: float
    flops: float = 0
    launches: int = 0
    traffic: str = "read"
    """Which bandwidth limits it: "read" where little is written, "copy" where as much is written as read."""


@dataclass(frozen=True)
class Ceilings:
    """What the device was measured to do in the same run."""

    read: float
    """Bytes per second of a read-only stream."""
    copy: float
    """Bytes read plus bytes written per second of a copy."""
    flops: float
    """bfloat16 operations per second of a large matrix product on random numbers."""
    node_us: float
    """Microseconds of an empty kernel within a CUDA graph."""

    def floor_us(self, work: Work) -> float:
        """Microseconds that bytes and operations take at the ceilings, launches not counted."""
        bandwidth = self.read if work.traffic == "read" else self.copy
        return 1e6 * max(work.bytes / bandwidth, work.flops / self.flops)

    def limit_us(self, work: Work) -> float:
        """The floor and one graph node per launch."""
        return self.floor_us(work) + work.launches * self.node_us


def decode_attention(entries: int, rows: int, group: int, dim: int) -> Work:
    """One new token per row of the batch; `entries` keys and as many values over all `rows` = B * H, tails included."""
    queries = rows * group * dim * HALF
    moved = 2 * entries * dim * HALF + 2 * queries + rows * group * SINGLE
    return Work(moved, 4 * entries * group * dim, launches=2)


def decode_tiers(entries: int, rows: int, tail: int, group: int, dim: int, key_bits: int, value_bits: int) -> Work:
    """As `decode_attention`, of `entries` in fewer bits over all rows and `tail` slots of 16 bits in each.

    A vector of codes has a scale and a zero of 16 bits; its queries and outputs are turned once.
    """
    plain = decode_attention(rows * tail, rows, group, dim)
    moved = entries * sum(dim * bits / 8 + (0 if bits == 16 else 2 * HALF) for bits in (key_bits, value_bits))
    turned = (key_bits < 16) + (value_bits < 16)
    flops = 4 * entries * group * dim + turned * 2 * rows * group * dim**2
    return Work(plain.bytes + moved, plain.flops + flops, launches=plain.launches + 3 * turned)


def quantize_entries(entries: int, dim: int, bits: int) -> Work:
    """Entries read, rotated with signs, and written as codes with a scale and a zero."""
    written = dim * bits / 8 + 2 * HALF
    return Work(entries * (dim * HALF + INDEX + written), 2 * entries * dim**2, launches=1, traffic="copy")


def window_scores(batch: int, heads: int, group: int, window: int, slots: int, dim: int, passes: int) -> Work:
    """Scores [B, H, S]; every pass reads the keys once and multiplies them with all queries of the window."""
    moved = passes * batch * heads * slots * dim * HALF + batch * heads * slots * SINGLE
    flops = passes * 2 * batch * heads * group * window * slots * dim
    return Work(moved, flops, launches=2 + 2 * (passes == 2))


def select(rows: int, slots: int) -> Work:
    """Radix selection of [rows, S] float32 scores: four readings."""
    return Work(4 * rows * slots * SINGLE, launches=8)


def gather_kv(entries: int, dim: int) -> Work:
    """Keys and values of `entries` entries read and written."""
    return Work(4 * entries * dim * HALF + entries * INDEX, launches=1, traffic="copy")


def page_bounds(rows: int, slots: int, dim: int, page: int) -> Work:
    """Minimum and maximum of the keys of every page."""
    return Work(rows * slots * dim * HALF * (1 + 2 / page), launches=1)


def prefill(linear: float, query_dim: int, layers: int, prompt: int) -> float:
    """Operations of reading a prompt: `linear` weights in matrix products, and causal attention."""
    return 2 * linear * prompt + 4 * layers * query_dim * prompt**2 / 2


def attention_pairs(new: int, entries: int) -> float:
    """Pairs of a query and an entry that it sees: `entries` of which the last `new` are the queries' own."""
    return new * (entries - new / 2)


def gated_attention(new: int, entries: int, query_heads: int, dim: int, products: int) -> Work:
    """`products` matrix products over all pairs: 2 in the forward pass; scores and dP again for the gates' gradient."""
    return Work(0, 2 * products * query_heads * dim * attention_pairs(new, entries), launches=1)
