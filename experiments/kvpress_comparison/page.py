"""The page of the comparison with kvpress."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]


def page(report: Row) -> Iterator[str]:
    """Lines of docs/results/kvpress.md from what docs/results/kvpress.json holds."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    rows = report["rows"]
    same = [row["method"] for row in rows if row["equal"] == report["prompts"]]
    untied = sum(row["untied"] for row in rows)
    yield "# Side by side with kvpress"
    yield ""
    yield from _text(
        f"""Written by `{report["command"]}`, commit {report["commit"]}. PATH is the interpreter of an environment with
        {versions}."""
    )
    yield from _text(
        f"""Both read the same weights (the reference model, float32) and the same tokens, and keep the same number of
        entries of {report["prompts"]} query-agnostic RULER prompts of 1,024 tokens. KL is to the full cache, in nats
        per token along the question and the full cache's answer; ± is one standard error."""
    )
    yield "## Equal definitions"
    yield ""
    yield from _text(
        f"""In {len(same)} of {len(rows)} rows all kept sets are equal. Of the entries that differ elsewhere, {untied}
        are not tied: a tie is a score within a hundred-thousandth of the last one that its head keeps, which rounding
        in another order decides (a token that occurs several times has keys of one norm in the first layer)."""
    )
    yield from _table(
        "method, kept, equal, differ, not tied, KL theirs, KL ours, score theirs, score ours, held theirs, held ours",
        (
            [row["method"], f"{row['spent']:.3f}", *_counts(row, report["prompts"]), *_sides(row, "theirs", "ours")]
            for row in rows
        ),
    )
    yield "What makes the definitions equal, and where what we ship differs:"
    yield ""
    yield from (f"- {name}: {note}." for name, note in report["notes"].items())
    yield ""
    yield "## As shipped"
    yield ""
    yield from _text("Theirs as above, ours by `configs/policies`, at the same number of entries.")
    yield from _table(
        "method, kept, KL theirs, KL ours, score theirs, score ours, bytes theirs, bytes ours",
        ([row["method"], f"{row['spent']:.3f}", *_sides(row, "theirs", "shipped")] for row in rows),
    )
    shape, (base, *_) = report["long"], report["steps"]
    yield "## Bytes and time"
    yield ""
    yield from _text(
        f"""A Llama of random weights ({shape["layers"]} layers, {shape["query_heads"]} query and {shape["kv_heads"]} kv
        heads of {shape["head_dim"]}, float32), one prompt of {shape["prompt"]:,} tokens, one CPU thread: CPU time of a
        decode step, median of 16. In brackets, relative to the same library without compression. Each runs on its own
        release of torch and transformers."""
    )
    yield from _table(
        "method, keep, held theirs, held ours, step theirs, step ours",
        (
            [row["method"], f"{row['keep']:g}"]
            + [_held(row[side]["bytes"], base[side]["bytes"]) for side in ("theirs", "ours")]
            + [_spent(row[side]["ms"], base[side]["ms"]) for side in ("theirs", "ours")]
            for row in report["steps"]
        ),
    )


def _counts(row: Row, prompts: int) -> list[str]:
    return [f"{row['equal']} of {prompts}", f"{row['differ']} of {row['entries']:,}", str(row["untied"])]


def _sides(row: Row, *sides: str) -> list[str]:
    """KL, score and bytes of two sides, in pairs."""
    return (
        [f"{row[side]['kl']:.4f} ± {row[side]['kl_stderr']:.4f}" for side in sides]
        + [f"{row[side]['score']:.1f} ± {row[side]['score_stderr']:.1f}" for side in sides]
        + [f"{row[side]['bytes'] / 1e3:,.0f} kB" for side in sides]
    )


def _held(size: float, base: float) -> str:
    return f"{size / 1e6:.2f} MB ({size / base:.3f})"


def _spent(ms: float, base: float) -> str:
    return f"{ms:.1f} ms ({ms / base:.2f})"


def _text(words: str) -> Iterator[str]:
    yield textwrap.fill(" ".join(words.split()), 119)
    yield ""


def _table(head: str, body: Iterable[list[str]]) -> Iterator[str]:
    columns = head.split(", ")
    yield f"| {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * (len(columns) - 1)}"
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    yield ""
