"""What is to be reached on an H200, and whether it was."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

MB = 1e6


def where(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    """Rows whose fields equal the wanted values, or pass the given test."""

    def fits(row: Row, key: str, want: Any) -> bool:
        value = row.get(key)
        return (value is not None and want(value)) if callable(want) else value == want

    return [row for row in rows if all(fits(row, key, want) for key, want in wanted.items())]


def lowest(rows: Iterable[Row], field: str) -> float | None:
    """The smallest value of a field."""
    return min((row[field] for row in rows if field in row), default=None)


def highest(rows: Iterable[Row], field: str) -> float | None:
    """The largest value of a field."""
    return max((row[field] for row in rows if field in row), default=None)


def _decode(rows: list[Row], /, **wanted: Any) -> list[Row]:
    return where(rows, kernel="decode_attention", impl="learnkv", **wanted)


def _skew_cost(rows: list[Row]) -> float | None:
    """The largest ratio of times, unequal heads to equal ones with the same number of entries."""
    even = {(row["model"], row["B"], row["budget"]): row for row in _decode(rows, skew="uniform") if "t_us" in row}
    ratios = [
        row["t_us"] / even[at]["t_us"]
        for row in _decode(rows, skew="adakv", bytes=lambda moved: moved >= 8 * MB)
        if "t_us" in row and (at := (row["model"], row["B"], row["budget"])) in even
    ]
    return max(ratios, default=None)


def _fewer_bits(rows: list[Row], case: str) -> float | None:
    """The largest ratio of times, entries in fewer bits to the same entries in 16, where those are 128 MB."""
    whole = where(rows, kernel="decode_tiers", case="k16v16", bytes=lambda moved: moved >= 128 * MB)
    even = {(row["model"], row["B"], row["budget"]): row for row in whole if "t_us" in row}
    ratios = [
        row["t_us"] / even[at]["t_us"]
        for row in where(rows, kernel="decode_tiers", case=case)
        if "t_us" in row and (at := (row["model"], row["B"], row["budget"])) in even
    ]
    return max(ratios, default=None)


def _against(rows: list[Row], peer: str, /, **wanted: Any) -> float | None:
    """The largest ratio of our time to that of a peer."""
    ratios = [1 / row["peer"][peer] for row in _decode(rows, **wanted) if peer in row.get("peer", {})]
    return max(ratios, default=None)


def _step(rows: list[Row], model: str, batch: int, prompt: int, budget: int) -> list[Row]:
    """Our graphed decode step with equal heads."""
    at = {"model": model, "B": batch, "T": prompt, "budget": budget, "skew": "uniform"}
    return where(rows, kernel="decode step", impl="learnkv graphed", **at)


def _over_full(rows: list[Row]) -> float | None:
    peers = [row.get("peer", {}) for row in _step(rows, LLAMA, 8, 32768, 512)]
    return lowest(peers, "full cache graphed")


def _throughput(rows: list[Row]) -> float | None:
    ours = highest(where(rows, kernel="capacity", impl="learnkv graphed"), "tokens_per_s")
    full = highest(where(rows, kernel="capacity", impl="full cache graphed"), "tokens_per_s")
    return ours / full if ours and full else None


def _tflops(rows: list[Row], case: str) -> float | None:
    found = where(rows, kernel=case, impl="learnkv", new=lambda n: n >= 4096, T=lambda n: n >= 4096)
    return max((row["flops"] / row["t_us"] / 1e6 for row in found if "t_us" in row), default=None)


LLAMA = "Llama-3.1-8B"


@dataclass(frozen=True)
class Target:
    """One line of the table; `measure` gives None where the rows do not say."""

    item: str
    condition: str
    unit: str
    goal: float
    stretch: float
    higher: bool
    measure: Callable[[list[Row]], float | None]


def _share(kernel: str, /, **wanted: Any) -> Callable[[list[Row]], float | None]:
    return lambda rows: lowest(where(rows, kernel=kernel, impl="learnkv", **wanted), "share")


def _time(kernel: str, /, **wanted: Any) -> Callable[[list[Row]], float | None]:
    return lambda rows: highest(where(rows, kernel=kernel, impl="learnkv", **wanted), "t_us")


def _ms(*at: Any) -> Callable[[list[Row]], float | None]:
    def measure(rows: list[Row]) -> float | None:
        found = lowest(_step(rows, *at), "t_us")
        return None if found is None else found / 1e3

    return measure


def _field(name: str, /, **wanted: Any) -> Callable[[list[Row]], float | None]:
    return lambda rows: highest(where(rows, impl="learnkv", **wanted), name)


TARGETS = [
    Target("decode attention", ">= 128 MB per call, equal heads", "of read bandwidth", 0.80, 0.88, True,
           _share("decode_attention", skew="uniform", bytes=lambda moved: moved >= 128 * MB)),
    Target("decode attention", "about 32 MB per call", "of read bandwidth", 0.50, 0.65, True,
           _share("decode_attention", skew="uniform", bytes=lambda moved: 24 * MB <= moved <= 48 * MB)),
    Target("decode attention", "<= 8 MB per call", "us", 11, 5, False,
           _time("decode_attention", skew="uniform", bytes=lambda moved: moved <= 8 * MB)),
    Target("decode attention", "heads as unequal as AdaKV's, same entries", "x the time of equal heads", 1.15, 1.05,
           False, _skew_cost),
    Target("decode attention", "against varlen flash attention, equal heads", "x its time", 1.0, 0.9, False,
           lambda rows: _against(rows, "flash varlen", skew="uniform")),
    Target("decode attention", "against varlen flash attention, unequal heads, >= 212 rows", "x its time", 0.8, 0.5,
           False, lambda rows: _against(rows, "flash varlen", skew="adakv", rows=lambda n: n >= 212)),
    Target("decode attention", "entries in 4 bits, of >= 128 MB in 16", "x the time of 16 bits", 0.45, 0.33, False,
           lambda rows: _fewer_bits(rows, "k4v4")),
    Target("decode attention", "entries in 3 bits, of >= 128 MB in 16", "x the time of 16 bits", 0.40, 0.27, False,
           lambda rows: _fewer_bits(rows, "k3v3")),
    Target("quantise", "gathered, rotated, packed, 4 bits, >= 32 MB read and written", "of the limit", 0.6, 0.8, True,
           _share("quantize_entries", case="4 bits", bytes=lambda moved: moved >= 32 * MB)),
    Target("window scores", "128k, two readings", "of the limit", 0.45, 0.6, True,
           _share("window_scores", case="two readings", T=131072, B=1)),
    Target("window scores", "128k, normalisers given", "of the limit", 0.45, 0.6, True,
           _share("window_scores", case="one reading", T=131072, B=1)),
    Target("window scores", "128k, extra memory over Hq*W*T numbers", "of it", 0.01, 0.005, False,
           _field("temporaries", kernel="window_scores", T=131072)),
    Target("select", "8 x 131072", "us", 60, 25, False, _time("select", rows=8, T=131072)),
    Target("select", "256 x 131072", "of four readings", 0.35, 0.5, True, _share("select", rows=256, T=131072)),
    Target("gather", ">= 64 MB moved", "of the limit", 0.70, 0.85, True,
           _share("gather_kv", bytes=lambda moved: moved >= 64 * MB)),
    Target("gather", "one layer, 512 kept", "us", 8, 5, False, _time("gather_kv", budget=512, B=1)),
    Target("page bounds", "128k", "of read bandwidth", 0.75, 0.80, True, _share("page_bounds", T=131072)),
    Target("page scores", "128k, B >= 8", "of read bandwidth", 0.65, 0.80, True, _share("page_scores", T=131072)),
    Target("page reading", "128k, B >= 8, whole step", "of the limit", 0.60, 0.88, True,
           _share("paged step", T=131072, B=lambda n: n >= 8)),
    Target("gated attention, forward", "Tq, Tk >= 4k, D = 128", "TFLOP/s", 400, 490, True,
           lambda rows: _tflops(rows, "gated forward")),
    Target("gated attention, backward", "Tq, Tk >= 4k, D = 128", "TFLOP/s", 320, 395, True,
           lambda rows: _tflops(rows, "gated backward")),
    Target("prefill", "32k: score, select and compact", "% of prefill", 1.0, 0.4, False,
           _field("overhead_percent", kernel="prefill", T=32768)),
    Target("decode step", f"{LLAMA}, B=1, 128k, 2048 kept", "ms", 4.8, 4.2, False,
           _ms(LLAMA, 1, 131072, 2048)),
    Target("decode step", f"{LLAMA}, B=8, 32k, 512 kept, over an ideal full cache", "x", 2.5, 2.8, True, _over_full),
    Target("throughput", f"{LLAMA}, 32k, 10 % kept, largest batch over the largest of a full cache", "x", 7, 8.5, True,
           _throughput),
    Target("decode step", "Qwen2.5-0.5B, B=1, 32k, 512 kept", "ms", 1.5, 0.8, False,
           _ms("Qwen2.5-0.5B", 1, 32768, 512)),
    Target("memory", f"{LLAMA}, 128k at once, 10 % kept: peak", "GB", 1.1 * 30.7, 1.1 * 23.1, False,
           lambda rows: lowest(where(rows, kernel="prefill", impl="learnkv", T=131072, case="one-shot"), "peak_gb")),
    Target("memory", "bytes of the compressed cache over the formula", "x", 1.02, 1.0, False,
           _field("bytes_over_formula")),
]  # fmt: skip


def summary(rows: list[Row], environment: dict[str, Any]) -> list[Row]:
    """A row per target with the value found and whether it passes; None where nothing was measured on a GPU."""
    measured = [] if environment["dry_run"] or environment["gpu"] == "none" else rows
    found = []
    for target in TARGETS:
        try:
            value = target.measure(measured)
        except (ArithmeticError, KeyError, TypeError) as error:  # a hole in the rows must not cost the whole run
            print(f"{target.item}, {target.condition}: {error!r}", file=sys.stderr)
            value = None
        reached = None if value is None else (value >= target.goal if target.higher else value <= target.goal)
        found.append(
            {
                "item": target.item,
                "condition": target.condition,
                "unit": target.unit,
                "goal": target.goal,
                "stretch": target.stretch,
                "value": value,
                "pass": reached,
            }
        )
    return found
