"""The picture of the README: loss against the kept part of the cache, from a study's `study.json`.

python -m tools.result_picture [--results FILE] [--panels needles,text] [--policies learned,kvzip,…] [--out FILE]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#00796b", "#5e35b1", "#1565c0", "#ef6c00", "#6d4c41", "#757575")
TITLES = {
    "needles": "facts and chains in 1,024 tokens, question read afterwards",
    "text": "held-out books, 900 tokens",
    "main": "nine tasks of RULER, question read afterwards",
}
"""Of comparisons in a study."""
SETTING, FULL = "query_agnostic", "full"

Row = Mapping[str, Any]


def picture(panels: Mapping[str, Sequence[Row]], policies: Sequence[str]) -> Figure:
    """A panel per comparison: KL from the full cache where it was measured, else the score.

    Args:
        panels: rows by the name of the comparison.
        policies: a line each; the first is the one to look at.
    """
    figure = Figure(figsize=(4.6 * len(panels) + 1.6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        _panel(axis, rows, policies)
        axis.set_title(TITLES.get(name, name), fontsize=9)
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False)
    return figure


def _panel(axis: Axes, rows: Sequence[Row], policies: Sequence[str]) -> None:
    value = "score" if rows[0]["kl"] is None else "kl"
    keeps = sorted({row["keep"] for row in rows if row["policy"] != FULL})
    for colour, policy in zip(COLOURS, policies, strict=False):
        of_keep = {
            keep: [row[value] for row in rows if (row["policy"], row["keep"]) == (policy, keep)] for keep in keeps
        }
        places = [at for at, keep in enumerate(keeps) if of_keep[keep]]  # some keep more than the least
        means = [fmean(of_keep[keeps[at]]) for at in places]
        first = policy == policies[0]
        axis.plot(places, means, color=colour, marker="o", linewidth=2.6 if first else 1.4, label=policy)
    axis.set_xticks(range(len(keeps)), [f"{100 * keep:g} %" for keep in keeps])
    axis.set_xlabel("part of the cache that is kept")
    axis.spines[["top", "right"]].set_visible(False)
    if value == "kl":
        axis.set_yscale("log")
        axis.set_ylabel("KL to the full cache, nats per token")
        return
    full = fmean(row["score_full"] for row in rows)
    axis.axhline(full, color="black", linewidth=1, linestyle="--")
    axis.text(0, full + 1, "full cache", fontsize=8)
    axis.set_ylabel("score (0 to 100), mean over tasks")
    axis.set_ylim(0, 105)


def read(file: Path, panels: Sequence[str]) -> dict[str, list[Row]]:
    """Query-agnostic rows of some of a study's comparisons."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {
        name: [{"metric": "generated", **row} for row in rows[name] if row["setting"] == SETTING] for name in panels
    }


def main() -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "smollm2" / "study.json")
    parser.add_argument("--panels", default="needles,text")
    parser.add_argument("--policies", default="learned,kvzip,observed_attention,layer_defensivekv,keydiff,snapkv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "result.png")
    given = parser.parse_args()
    picture(read(given.results, given.panels.split(",")), given.policies.split(",")).savefig(given.out)
    print(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
