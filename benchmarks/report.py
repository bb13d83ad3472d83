"""The table of `docs/performance.md` and its charts, from `benchmarks/results/*.json`: `python -m benchmarks.report`.

Charts: time at the limit over time taken, per kernel; time of a peer over ours. Without a result from a GPU the
document says so in place of numbers.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.targets import TARGETS, where

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOT_MEASURED = "not measured on a GPU yet"


def documents(folder: Path) -> list[dict[str, Any]]:
    """Results that a GPU gave, the oldest first; a dry run is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = [one for one in found if one["environment"]["gpu"] != "none" and not one["environment"]["dry_run"]]
    return sorted(found, key=lambda one: one["environment"]["date"])


def text(found: list[dict[str, Any]]) -> str:
    """What stands between the marks: where it was measured, targets, and every row that has a limit."""
    if not found:
        return "\n".join([*_head(None), "", *_targets(None)])
    newest = found[-1]
    return "\n".join(
        [*_head(newest), "", *_targets(newest), "", *_steps(newest["rows"]), "", *_kernels(newest["rows"])]
    )


def _head(document: dict[str, Any] | None) -> list[str]:
    if document is None:
        return [f"Every figure of the targets below is **{NOT_MEASURED}**: there is no file in `benchmarks/results/`."]
    found = document["environment"]
    lines = [
        f"{found['gpu']}, commit {found['sha']}, {found['date']}; torch {found['torch']}, triton {found['triton']}, "
        f"transformers {found['transformers']}.",
        f"Ceilings of the same run: read {found['bw_read'] / 1e12:.2f} TB/s, copy {found['bw_copy'] / 1e12:.2f} TB/s "
        f"(read + written), bfloat16 {found['tflops']:.0f} TFLOP/s, a graph node {found['t_node_us']:.2f} us"
        + (f", a launch {found['host_op_us']:.1f} us of the host." if found.get("host_op_us") else "."),
    ]
    if not found["ceilings_measured"]:
        lines.append("**Ceilings were not measured in this run**: those of a data sheet stand in for them.")
    unfinished = [name for name, part in found["parts"].items() if not part["finished"]]
    if unfinished:
        lines.append(f"**Stopped before their end**: {', '.join(unfinished)}.")
    if tests := found.get("tests"):
        named = f" ({', '.join(tests['names'])})" if tests.get("names") else ""
        counted = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        lines.append(f"GPU tests: {counted}{named}.")
    above = [row for row in document["rows"] if row.get("above_limit")]
    if above:
        names = sorted({f"{row['kernel']} ({row['impl']})" for row in above})
        lines.append(f"Faster than their limit, so that a ceiling or a byte count is wrong: {', '.join(names)}.")
    return lines


def _targets(document: dict[str, Any] | None) -> list[str]:
    lines = ["| item | condition | target | stretch | found | |", "|---|---|---|---|---|---|"]
    values = {} if document is None else {(one["item"], one["condition"]): one for one in document["summary"]}
    for target in TARGETS:
        one = values.get((target.item, target.condition))
        sign = ">=" if target.higher else "<="
        goal = f"{sign} {target.goal:.3g} {target.unit}"
        if one is None or one["value"] is None:
            found, verdict = NOT_MEASURED, ""
        else:
            found, verdict = f"{one['value']:.3g}", "reached" if one["pass"] else "**missed**"
        lines.append(f"| {target.item} | {target.condition} | {goal} | {target.stretch:.3g} | {found} | {verdict} |")
    return lines


def _steps(rows: list[Row]) -> list[str]:
    """Whole decode steps."""
    full = "full cache graphed"
    lines = ["| model | B | prompt | kept | skew | implementation | ms | limit ms | share | x full cache | peak GB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in where(rows, kernel=lambda name: name in ("decode step", "capacity")):
        at = f"| {row['model']} | {row['B']} | {row['T']} | {row['budget']} | {row['skew']} | {row['impl']} "
        if "t_us" not in row:
            lines.append(at + f"| {row['failed']} | | | | |")
            continue
        gain = ""
        if full in row.get("peer", {}):
            gain = f"{row['peer'][full]:.2f} of {row['peer_limit'][full]:.2f}"
        lines.append(
            at + f"| {row['t_us'] / 1e3:.2f} | {row['t_limit_us'] / 1e3:.2f} | {row['frac']:.2f} "
            f"| {gain} | {row.get('peak_gb', 0):.1f} |"
        )
    return lines


def _kernels(rows: list[Row]) -> list[str]:
    """Our kernels, with their times over the limit's and every peer's time over theirs."""
    lines = ["| kernel | case | B | T | kept | skew | MB | us | limit us | share | peers' time over ours |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in where(rows, impl="learnkv", t_limit_us=lambda _: True):
        if row["kernel"] == "decode step":
            continue
        peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.get("peer", {}).items())
        named = " ".join(str(row[key]) for key in ("model", "case") if key in row)
        sizes = " | ".join(str(row.get(key, "")) for key in ("B", "T", "budget", "skew"))
        lines.append(
            f"| {row['kernel']} | {named} | {sizes} | {row['bytes'] / 1e6:.1f} | {row['t_us']:.1f} "
            f"| {row['t_limit_us']:.1f} | {row['frac']:.2f} | {peers} |"
        )
    return lines


def charts(document: dict[str, Any], folder: Path) -> list[Path]:
    """Ratio to the limit against bytes, and peers' times over ours, as pictures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    rows, found = document["rows"], document["environment"]
    pictures = []

    figure, axes = pyplot.subplots(figsize=(9, 5))
    drawn = where(rows, frac=lambda _: True, bytes=lambda moved: moved > 0)
    for name in sorted({f"{row['kernel']}: {row['impl']}" for row in drawn}):
        points = sorted((row["bytes"] / 1e6, row["frac"]) for row in drawn if f"{row['kernel']}: {row['impl']}" == name)
        ours = name.endswith(("learnkv", "graphed"))
        axes.plot(*zip(*points, strict=True), "o" if ours else "x", label=name, alpha=0.8 if ours else 0.5)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="MB moved at least", ylabel="time at the limit / time", ylim=(0, 1.15))
    axes.legend(fontsize=6, ncols=2)
    pictures.append(_save(figure, axes, "Time at the measured ceilings over time taken", found, folder / "limit.png"))

    bars = [
        (f"{row['kernel']} {row.get('model', '')} B={row.get('B', '')} T={row.get('T', '')} {row.get('budget', '')} "
         f"{row.get('skew', '')}: {peer}", ratio)
        for row in where(rows, peer=lambda _: True) for peer, ratio in row["peer"].items()
    ]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.14 * len(bars)))
    axes.barh([name for name, _ in bars], [ratio for _, ratio in bars], height=0.7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time of the peer / our time")
    axes.tick_params(axis="y", labelsize=5)
    axes.invert_yaxis()
    pictures.append(_save(figure, axes, "Peers on the same inputs", found, folder / "peers.png"))
    return pictures


def _save(figure: Any, axes: Any, title: str, found: dict[str, Any], path: Path) -> Path:
    axes.set_title(f"{title}\n{found['gpu']}, {found['sha']}, {found['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return path


def main(argv: list[str] | None = None) -> None:
    """Write the tables of the results into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(argv)
    found = documents(options.results)
    before, _, rest = options.document.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    options.document.write_text(f"{before}{BEGIN}\n{text(found)}\n{END}{after}", encoding="utf-8")
    print(options.document)
    for picture in charts(found[-1], options.document.parent / "performance") if found else []:
        print(picture)


if __name__ == "__main__":
    main()
