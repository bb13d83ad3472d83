"""Tables and pictures of made-up results under budgets of bytes: never in one column with budgets of entries."""

from typing import Any

import numpy as np
import pytest

from learnkv.evaluation import pictures
from learnkv.evaluation.merge import Evaluation, csv_text, markdown
from learnkv.evaluation.panels import budget_labels
from learnkv.evaluation.report import markdown as report
from learnkv.evaluation.results import rows_of

FULL = 1_000_000
SPENT = {0.1: 0.35, 0.05: 0.176}
"""Entries that fit into a part of the bytes at 4 bits."""


def sample(policy: str, index: int, score: float, spent: float, held: int, **more: Any) -> dict[str, Any]:
    about = {"policy": policy, "metric": "forced", "task": "vt", "length": 1024, "setting": "query_agnostic"}
    size = {"asked": spent, "spent": spent, "bytes": held, "bytes_full": FULL, "haystack": None}
    budget = {"keep": None, "budget": None, "bytes_budget": None, "asked_bytes": None, "precision": "16"}
    return {**about, "index": index, **size, **budget, "score": score, "kl": (100 - score) / 100, **more}


def in_bytes(policy: str, budget: float | int, score: float, precision: str) -> list[dict[str, Any]]:
    part = budget if isinstance(budget, float) else budget / FULL
    asked = {"bytes_budget": budget, "asked_bytes": round(part * FULL), "precision": precision}
    return [sample(policy, at, score + at, SPENT.get(part, part), round(part * FULL) - 7, **asked) for at in range(2)]


def whole(policy: str, score: float, held: int, precision: str) -> list[dict[str, Any]]:
    return [sample(policy, at, score + at, 1.0, held, keep=1.0, precision=precision) for at in range(2)]


@pytest.fixture
def records() -> list[dict[str, Any]]:
    found = whole("full", 98, FULL, "16") + whole("full@4", 90, 281_000, "4")
    for budget in (0.1, 0.05, 65536):
        found += in_bytes("kvzip@4", budget, 70, "4") + in_bytes("learned", budget, 80, "learned")
    found += [sample("kvzip", at, 60, 0.1, 105_000, keep=0.1) for at in range(2)]
    return found


def cells(text: str, heading: str) -> list[list[str]]:
    part = next(part for part in text.split("\n#") if heading in part.split("\n")[0])
    lines = [line for line in part.split("\n") if line.startswith("| ") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_rows_have_what_was_asked_and_what_is_held(records: list[dict[str, Any]]) -> None:
    rows = {(row["policy"], row["keep"], row["bytes_budget"]): row for row in rows_of(records)}
    row = rows["kvzip@4", None, 0.05]
    assert (row["asked_bytes"], row["bytes"], row["bytes_full"]) == (50_000, 49_993, FULL)
    assert (row["precision"], row["metric"], row["n"], row["budget"]) == ("4", "forced", 2, None)
    assert rows["learned", None, 65536]["asked_bytes"] == 65536
    assert (rows["full@4", 1.0, None]["asked_bytes"], rows["full@4", 1.0, None]["precision"]) == (None, "4")
    assert len(rows) == 2 + 2 * 3 + 1


def test_samples_of_earlier_versions_are_rows_too(records: list[dict[str, Any]]) -> None:
    new = {"bytes_budget", "asked_bytes", "precision"}
    old = [{key: value for key, value in one.items() if key not in new} for one in records if one["keep"] is not None]
    assert [row["keep"] for row in rows_of(old)] == [1.0, 1.0, 0.1]
    assert {row["precision"] for row in rows_of(old)} == {None}


def test_budgets_of_bytes_are_columns_of_their_own(records: list[dict[str, Any]]) -> None:
    columns = ["keep 1", "keep 0.1", "bytes 0.1", "bytes 0.05", "bytes 64KB"]
    assert budget_labels(rows_of(records)) == columns
    text = report("tiny", rows_of(records), records, {})
    head, plain, old, kvzip, learned = cells(text, "Query-agnostic: the question")
    assert head == ["policy", *columns]
    assert plain[:2] == ["full@4", "**90.5 ± 0.5** · 0.0950 · 281 kB · 1.000"]
    assert kvzip == [
        "kvzip@4",
        "–",
        "–",
        "**70.5 ± 0.5** · 0.2950 · 100 kB · 0.350",
        "**70.5 ± 0.5** · 0.2950 · 50 kB · 0.176",
        "**70.5 ± 0.5** · 0.2950 · 65.5 kB · 0.066",
    ]
    assert (learned[0], old[0], old[2:]) == ("learned", "kvzip", ["**60.0 ± 0.0** · 0.4000 · 105 kB · 0.100", *"–––"])
    minus = cells(text, "learned minus heuristic")
    assert minus[0] == ["minus", "bytes 0.1", "bytes 0.05", "bytes 64KB"]
    assert [row[0] for row in minus[1:]] == ["kvzip@4", "kvzip", "best heuristic"]  # the whole cache is none of them
    assert minus[1][1:] == ["-0.1000 ± 0.0000"] * 3


def test_the_picture_of_bytes_has_parts_of_the_full_cache_and_whole_caches_as_lines(
    records: list[dict[str, Any]],
) -> None:
    entries, part = pictures.pareto(rows_of(records)).axes
    assert entries.get_xlabel() == pictures.HELD
    assert [one.get_label() for one in entries.containers] == ["kvzip"]
    assert "part of the full cache's at 16 bits" in part.get_xlabel()
    lines = {one.get_label(): one.lines[0].get_xydata() for one in part.containers}
    assert set(lines) == {"kvzip@4", "learned"}
    np.testing.assert_allclose(lines["kvzip@4"][:, 0], [0.099993, 0.049993, 0.065529])
    np.testing.assert_allclose(lines["kvzip@4"][:, 1], 0.295)
    own = {line.get_label(): line for line in part.lines if line.get_label() in ("full cache", "full@4")}
    assert set(own["full cache"].get_xdata()) == {1}
    assert set(own["full@4"].get_ydata()) == {0.095}
    assert [text.get_text() for text in part.texts] == ["full@4: 0.095 with 28.1 %"]
    assert [tick.get_text() for tick in part.get_xticklabels()][:2] == ["bytes 0.1\n10 %", "bytes 0.05\n5 %"]


def test_generated_scores_have_both_lines(records: list[dict[str, Any]]) -> None:
    generated = [{**one, "metric": "generated"} for one in records if one["bytes_budget"] or one["keep"] == 1]
    (axis,) = pictures.pareto(rows_of(generated)).axes
    lines = {line.get_label(): set(line.get_ydata()) for line in axis.lines}
    assert (lines["full cache"], lines["full@4"]) == ({98.5}, {90.5})


def test_merged_tables_keep_them_apart_too(records: list[dict[str, Any]]) -> None:
    (old,) = [row for row in rows_of(records) if row["policy"] == "kvzip"]
    merged = [Evaluation("a", "tiny", {}, rows_of(records)), Evaluation("b", "tiny", {}, [{**old, "policy": "snapkv"}])]
    (head,) = [line for line in markdown(merged).splitlines() if line.startswith("| policy")]
    assert head == "| policy | samples | keep 1 | keep 0.1 | bytes 0.1 | bytes 0.05 | bytes 64KB |"
    assert "asked_bytes" in csv_text(merged).splitlines()[0]
