"""Tables and pictures of made-up results: the right numbers in the right places, settings never in one table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from learnkv.evaluation import pictures
from learnkv.evaluation.panels import size
from learnkv.evaluation.report import _best, markdown
from learnkv.evaluation.results import rows_of

KEEPS = (0.5, 0.1)
BYTES = {1.0: 2_000_000, 0.5: 1_000_000, 0.1: 200_000}
MEANS = {"full": 90, "snapkv": 30, "adakv": 40, "learned-mine": 80}


def record(
    policy: str, keep: float, setting: str, task: str, index: int, shift: float = 0.0, **more: Any
) -> dict[str, Any]:
    score = MEANS[policy] + shift - 20 * (keep == 0.1) + 4 * index + (task == "vt")
    about = {"policy": policy, "metric": "generated", "task": task, "length": 1024, "setting": setting, "index": index}
    size = {"keep": keep, "budget": None, "asked": keep, "spent": keep, "bytes": BYTES[keep], "bytes_full": BYTES[1.0]}
    budgets = {"budgets": [[keep, keep / 2], [0.0, 1.0]]} if policy.startswith("learned") else {}
    return {**about, **size, "haystack": "noise", "score": score, **budgets, **more}


def records_of(
    setting: str, tasks: tuple[str, ...] = ("niah_single_1", "vt"), shift: float = 0.0, **more: Any
) -> list[dict[str, Any]]:
    found = [record("full", 1.0, setting, task, i, shift, **more) for task in tasks for i in range(3)]
    for policy in ("snapkv", "adakv", "learned-mine"):
        found += [record(policy, k, setting, t, i, shift, **more) for k in KEEPS for t in tasks for i in range(3)]
    return found


def text_records() -> list[dict[str, Any]]:
    kl = {"full": 0.0, "snapkv": 0.4, "adakv": 0.2, "learned-mine": 0.1}
    found = []
    for one in records_of("query_agnostic", ("text",)):
        found.append({**one, "kl": kl[one["policy"]] + one["index"] / 100, "loss": 1.0})
    return found


@pytest.fixture
def both() -> list[dict[str, Any]]:
    return records_of("query_agnostic") + records_of("query_aware", shift=5.0)


def report(records: list[dict[str, Any]], starts: dict[str, str] | None = None) -> str:
    return markdown("tiny", rows_of(records), records, starts or {})


def tables(text: str) -> dict[str, list[list[str]]]:
    """Heading and rows of every table."""
    found: dict[str, Any] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line
        elif line.startswith("| ") and "---" not in line:
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_a_table_per_setting_with_score_error_bytes_and_share(both: list[dict[str, Any]]) -> None:
    found = tables(report(both))
    agnostic = next(table for title, table in found.items() if title.startswith("## Query-agnostic"))
    aware = next(table for title, table in found.items() if title.startswith("## Query-aware"))
    assert agnostic[0] == ["policy", "keep 0.5", "keep 0.1"]
    # 30 + 4 + 0.5 over tasks; 4 / sqrt(3) per task, two tasks
    assert agnostic[1] == ["snapkv", "**34.5 ± 1.6** · 1 MB · 0.500", "**14.5 ± 1.6** · 200 kB · 0.100"]
    assert aware[1] == ["snapkv", "**39.5 ± 1.6** · 1 MB · 0.500", "**19.5 ± 1.6** · 200 kB · 0.100"]
    assert [row[0] for row in agnostic] == ["policy", "snapkv", "adakv", "learned-mine"]
    assert not any("query" in " ".join(row) for table in found.values() for row in table)


def test_the_full_cache_stands_above_the_table(both: list[dict[str, Any]]) -> None:
    text = report(both)
    assert "Mean over 2 tasks (niah_single_1, vt), 3 samples each. Full cache: **94.5 ± 1.6** · 2 MB · 1.000." in text


def test_learned_minus_heuristic_is_paired(both: list[dict[str, Any]]) -> None:
    found = tables(report(both, {"learned-mine": "adakv"}))
    assert found["### Query-aware: learned-mine minus heuristic, paired by prompt"][1][1] == "+50.0 ± 0.0"
    assert found["### Query-agnostic: learned-mine minus heuristic, paired by prompt"] == [
        ["minus", "keep 0.5", "keep 0.1"],
        ["snapkv", "+50.0 ± 0.0", "+50.0 ± 0.0"],
        ["adakv (it starts from this)", "+40.0 ± 0.0", "+40.0 ± 0.0"],
        ["best heuristic", "adakv", "adakv"],
    ]


def test_every_task_is_listed_once_per_policy_and_keep(both: list[dict[str, Any]]) -> None:
    details = report(both).split("## Every task")[1]
    agnostic = next(table for title, table in tables(details).items() if "Query-agnostic" in title)
    assert agnostic[0] == ["policy", "budget", "bytes", "niah_single_1", "vt"]
    assert agnostic[1] == ["full", "keep 1", "2 MB", "94.0 ± 2.3", "95.0 ± 2.3"]
    assert len(agnostic) == 1 + 1 + 3 * 2


def test_passes_that_a_policy_takes_beside_the_first_are_named(both: list[dict[str, Any]]) -> None:
    assert "reads every prompt" not in report(both)
    for one in both:
        one["prefills"] = 2.125 if one["policy"] == "adakv" else 1.0
    assert report(both).count("adakv reads every prompt 2.12 times before it evicts.") == 2
    assert report(both).count("reads every prompt") == 2


def test_text_is_a_table_of_kl(both: list[dict[str, Any]]) -> None:
    found = tables(report(both + text_records(), {"learned-mine": "snapkv"}))
    kl = next(table for title, table in found.items() if title.startswith("## Text"))
    assert kl[1] == ["snapkv", "**0.4100** · ppl 2.72 · 1 MB · 0.500", "**0.4100** · ppl 2.72 · 200 kB · 0.100"]
    minus = next(t for title, t in found.items() if title.startswith("### Text: KL"))
    assert minus[1][:2] == ["snapkv (it starts from this)", "-0.3000 ± 0.0000"]
    assert minus[-1] == ["best heuristic", "adakv", "adakv"]


def test_answers_that_are_read_have_a_table_of_their_own(both: list[dict[str, Any]]) -> None:
    kl = {"full": 0.0, "snapkv": 0.4, "adakv": 0.2, "learned-mine": 0.1}
    forced = [{**one, "metric": "forced", "kl": kl[one["policy"]] + one["index"] / 100, "score": 75.0} for one in both]
    generated, found = tables(report(both)), tables(report(both + forced))
    assert {title: found[title] for title in generated if "Time" not in title} == generated
    agnostic = next(table for title, table in found.items() if title.startswith("## Query-ag") and "read, not" in title)
    assert agnostic[1][:2] == ["snapkv", "**75.0 ± 0.0** · 0.4100 · 1 MB · 0.500"]
    minus = next(t for title, t in found.items() if title.startswith("### Query-agnostic, KL of the answer"))
    assert minus[1][:2] == ["snapkv", "-0.3000 ± 0.0000"]
    rows = {(row["policy"], row["metric"], row["task"], row["setting"], row["keep"]): row for row in rows_of(forced)}
    row = rows["adakv", "forced", "vt", "query_aware", 0.1]
    assert row["kl"] == pytest.approx(0.21)
    assert row["kl_stderr"] == pytest.approx(0.01 / 3**0.5)
    figure = pictures.pareto(rows_of(both + forced))
    assert sum(axis.get_ylabel().startswith("KL") for axis in figure.axes) == 2
    assert sum(axis.get_ylabel().startswith("score") for axis in figure.axes) == 2


def test_one_sample_has_no_error_and_no_policy_no_table() -> None:
    one = [record("full", 1.0, "query_agnostic", "vt", 0)]
    assert "Full cache: **91.0** · 2 MB · 1.000." in report(one)
    assert list(tables(report(one))) == ["### Query-agnostic: the question is read after compression, 1,024 tokens"]
    assert "No sample is finished." in report([])


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (3_146_000, "3.15 MB"), (2e9, "2 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def lines_of(axis: Axes) -> dict[str, np.ndarray[Any, Any]]:
    return {container.get_label(): container.lines[0].get_xydata() for container in axis.containers}


def test_pareto_shows_score_against_bytes_in_a_panel_per_setting(both: list[dict[str, Any]]) -> None:
    figure = pictures.pareto(rows_of(both + text_records()))
    agnostic, aware, text = figure.axes
    assert agnostic.get_title().startswith("Query-agnostic")
    assert aware.get_title().startswith("Query-aware")
    np.testing.assert_allclose(lines_of(agnostic)["snapkv"], [[1e6, 34.5], [2e5, 14.5]])
    np.testing.assert_allclose(lines_of(aware)["learned-mine"], [[1e6, 89.5], [2e5, 69.5]])
    np.testing.assert_allclose(lines_of(text)["adakv"], [[1e6, 0.21], [2e5, 0.21]])
    assert agnostic.get_xscale() == text.get_yscale() == "log"
    (full,) = (line for line in agnostic.lines if line.get_label() == "full cache")
    assert set(full.get_ydata()) == {94.5}
    assert [text.get_text() for text in agnostic.texts] == ["94.5 with 2 MB"]
    assert [tick.get_text() for tick in agnostic.get_xticklabels()] == ["keep 0.5\n1 MB", "keep 0.1\n200 kB"]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names) == ["adakv", "full cache", "learned-mine", "snapkv"]
    markers = {container.get_label(): container.lines[0].get_marker() for container in agnostic.containers}
    assert len(set(markers.values())) == 3


def test_with_many_policies_names_stay_inside_and_who_holds_the_whole_cache_moves_no_tick(
    both: list[dict[str, Any]],
) -> None:
    some = [one for one in both if one["policy"] == "snapkv"]
    whole = [one | {"policy": "quest", "bytes": 2_100_000} for one in some]
    more = [one | {"policy": f"quite_a_long_name_{at}"} for at in range(30) for one in some]
    figure = pictures.pareto(rows_of(both + whole + more))
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == ["keep 0.5\n1 MB", "keep 0.1\n200 kB"]
    figure.draw_without_rendering()
    names, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= names.x0
    assert names.x1 <= page.x1
    assert page.y0 <= names.y0
    assert names.y1 <= page.y1
    assert all(axis.get_window_extent().width > 300 for axis in figure.axes)


def test_heatmap_shows_mean_kept_fractions(both: list[dict[str, Any]]) -> None:
    figure = pictures.heatmap(both, "learned-mine")
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert [axis.get_title() for axis in panels] == [
        "keep 0.5\nquery-agnostic",
        "keep 0.1\nquery-agnostic",
        "keep 0.5\nquery-aware",
        "keep 0.1\nquery-aware",
    ]
    np.testing.assert_allclose(panels[1].images[0].get_array(), [[0.1, 0.05], [0, 1]])
    assert pictures.heatmap(both, "snapkv") is None


def test_pictures_are_written_whole(both: list[dict[str, Any]], tmp_path: Path) -> None:
    pictures.save(pictures.pareto(rows_of(both)), tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["pareto.png"]


def test_a_picture_that_fails_leaves_the_older_one_and_nothing_else(
    both: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, path = pictures.pareto(rows_of(both)), tmp_path / "pareto.png"
    path.write_bytes(b"older")

    def cut(part: Path, **_: Any) -> None:
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", cut)
    with pytest.raises(OSError, match="No space"):
        pictures.save(figure, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]


def test_of_equal_heuristics_none_is_the_best() -> None:
    record = {"task": "vt", "score": 0.0}
    assert _best({"snapkv": [record], "adakv": [record]}, "score") == "2 alike"
    assert _best({"snapkv": [record], "adakv": [{**record, "score": 1.0}]}, "score") == "adakv"


def test_tasks_that_the_full_cache_fails_are_named_and_in_no_mean() -> None:
    able = records_of("query_agnostic", ("niah_single_1",))
    failed = [{**one, "score": 0.0} for one in records_of("query_agnostic", ("vt",))]
    text = report([*able, *failed])
    assert tables(text)["## Query-agnostic: the question is read after compression, 1,024 tokens"] == next(
        table for title, table in tables(report(able)).items() if title.startswith("## Query-agnostic")
    )
    assert "The full cache scores near 0 on vt (0.0)" in text
    assert "no mean has these scores" in text
    assert "| policy | budget | bytes | niah_single_1 | vt |" in text
    (figure,), (alone,) = (pictures.pareto(rows_of(records)).axes for records in ([*able, *failed], able))
    assert len(figure.lines) == len(alone.lines) > 0
    for line, other in zip(figure.lines, alone.lines, strict=True):
        assert np.array_equal(line.get_ydata(), other.get_ydata())
    assert "compare no policies" in report(failed)
