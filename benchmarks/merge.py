"""One document of all parts of a run, with a limit and a fraction for every row: `<gpu>-<sha>.json`.

`python -m benchmarks.merge FOLDER --into benchmarks/results` reads `FOLDER/*.json` (and `*.xml` of pytest) and
prints how the targets stand. It imports no torch: it runs after every part.
"""

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.limits import Ceilings, Work
from benchmarks.targets import summary

Row = dict[str, Any]

DATASHEET = Ceilings(read=4.3e12, copy=4.3e12, flops=790e12, node_us=1.2)
"""What is assumed of an H200 where `ceilings` did not finish; the document then says so."""

SAME = ("kernel", "model", "B", "T", "budget", "skew", "dtype", "case", "rows", "new")
"""Rows that agree in these were measured on the same inputs and are compared."""

OURS = ("learnkv", "learnkv graphed")


def merge(folder: Path) -> dict[str, Any]:
    """One document of all parts of a folder."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not parts:
        sys.exit(f"error: no part in {folder}")
    found = dict(parts[0]["environment"])
    found["parts"] = {part["part"]: {"finished": part["finished"], "seconds": part["seconds"]} for part in parts}
    for part in parts:  # a peer may need versions of its own
        differs = {key: value for key, value in part["environment"].items() if found[key] != value and key != "date"}
        if differs:
            found["parts"][part["part"]]["differs"] = differs
    rows = [row | {"part": part["part"]} for part in parts for row in part["rows"]]
    measured = {row["kernel"]: row["value"] for row in rows if row.get("part") == "ceilings" and "value" in row}
    ceilings = Ceilings(
        read=measured.get("bw_read", DATASHEET.read),
        copy=measured.get("bw_copy", DATASHEET.copy),
        flops=measured.get("flops", DATASHEET.flops),
        node_us=measured.get("t_node_us", DATASHEET.node_us),
    )
    found["ceilings_measured"] = len(measured) >= 4
    found |= {"bw_read": ceilings.read, "bw_copy": ceilings.copy, "tflops": ceilings.flops / 1e12}
    found |= {"t_node_us": ceilings.node_us, "host_op_us": measured.get("host_op_us")}
    if files := sorted(folder.glob("*.xml")):
        found["tests"] = tests(files)
    if (folder / "status").is_file():
        found["status"] = (folder / "status").read_text(encoding="utf-8").splitlines()
    for row in rows:
        add_limit(row, ceilings)
    add_peers(rows)
    return {"environment": found, "rows": rows, "summary": summary(rows, found)}


def add_limit(row: Row, ceilings: Ceilings) -> None:
    """Limit, fraction of it, and the share of the bare ceiling, launches not counted."""
    if "bytes" not in row or "t_us" not in row:
        return
    work = Work(row["bytes"], row["flops"], row["n_launch"], row["traffic"])
    row["t_limit_us"] = ceilings.limit_us(work)
    row["frac"] = row["t_limit_us"] / row["t_us"]
    row["share"] = ceilings.floor_us(work) / row["t_us"]
    if row["frac"] > 1:
        row["above_limit"] = True  # a ceiling measured too low, or bytes that came out of a cache


def add_peers(rows: list[Row]) -> None:
    """For each of our rows, how many times its time every other contender took on the same inputs, and may take."""
    races: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "t_us" in row:
            races.setdefault(tuple(row.get(key) for key in SAME), []).append(row)
    for group in races.values():
        for ours in group:
            if ours["impl"] in OURS:
                others = [one for one in group if one is not ours]
                if others:
                    ours["peer"] = {one["impl"]: one["t_us"] / ours["t_us"] for one in others}
                limited = [one for one in others if "t_limit_us" in one and "t_limit_us" in ours]
                if limited:  # what the bytes would allow
                    ours["peer_limit"] = {one["impl"]: one["t_limit_us"] / ours["t_limit_us"] for one in limited}


def tests(files: list[Path]) -> dict[str, Any]:
    """Counts of junit files, and the names of what failed."""
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    failed = []
    for case in (case for path in files for case in _cases(path)):
        state = "passed"
        if case.find("skipped") is not None:
            state = "skipped"
        elif case.find("failure") is not None or case.find("error") is not None:
            state = "failed"
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        counts[state] += 1
    return counts | ({"names": failed[:40]} if failed else {})


def _cases(path: Path) -> list[ElementTree.Element]:
    try:
        return list(ElementTree.parse(path).getroot().iter("testcase"))
    except ElementTree.ParseError:  # stopped while it was written
        return []


def main(argv: list[str] | None = None) -> None:
    """Merge the parts of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args(argv)
    document = merge(options.folder)
    found = document["environment"]
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower().removeprefix("nvidia ")).strip("-")
    name = f"{'dry-run' if found['dry_run'] else gpu}-{found['sha']}.json"
    options.into.mkdir(parents=True, exist_ok=True)
    (options.into / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for target in document["summary"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.3g} {target['unit']}"
        verdict = {True: "pass", False: "FAIL", None: "-"}[target["pass"]]
        print(f"{verdict:5} {target['item']}, {target['condition']}: {value} (target {target['goal']:g})")
    print(options.into / name)


if __name__ == "__main__":
    main()
