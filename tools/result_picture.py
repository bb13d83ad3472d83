"""The picture of the README: score against the kept fraction, from `docs/results/study.json` or a `results.json`.

python -m tools.result_picture [--results FILE] [--policies learned,kvzip,…] [--out docs/assets/result.png]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#00796b", "#5e35b1", "#1565c0", "#ef6c00", "#6d4c41", "#757575")
SETTING = "query_agnostic"

Row = Mapping[str, Any]


def picture(rows: Sequence[Row], policies: Sequence[str]) -> Figure:
    """Mean score over tasks against the kept fraction, a line per policy; the first is the one to look at."""
    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    axis = figure.subplots()
    full = fmean(row["score_full"] for row in rows)
    axis.axhline(full, color="black", linewidth=1, linestyle="--")
    keeps = sorted({row["keep"] for row in rows if row["policy"] != "full"})
    for colour, policy in zip(COLOURS, policies, strict=False):
        means = [_mean(rows, policy, keep) for keep in keeps]
        first = policy == policies[0]
        axis.plot(range(len(keeps)), means, color=colour, marker="o", linewidth=2.6 if first else 1.4, label=policy)
    axis.set_xticks(range(len(keeps)), [f"{keep:.0%}" for keep in keeps])
    axis.set_xlabel("part of the cache that is kept")
    axis.set_ylabel("score (0 to 100), mean over tasks")
    axis.text(0, full + 1, "full cache", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_ylim(0, 105)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _mean(rows: Sequence[Row], policy: str, keep: float) -> float:
    return fmean(row["score"] for row in rows if row["policy"] == policy and row["keep"] == keep)


def read(file: Path) -> list[Row]:
    """Rows of one setting with a score, of the main part where a file has several."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    chosen = rows["main"] if isinstance(rows, dict) else rows
    return [row for row in chosen if row["setting"] == SETTING and row["score"] is not None]


def main() -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "study.json")
    parser.add_argument("--policies", default="learned,kvzip,headkv,adakv,snapkv,streaming_llm")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "result.png")
    given = parser.parse_args()
    picture(read(given.results), given.policies.split(",")).savefig(given.out)
    print(given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
