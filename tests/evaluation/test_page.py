"""`report.html`: the numbers of the results in one file that loads nothing; tests/browser opens it."""

import json
import re
import shlex
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from support.page import HEADS, HOSTILE, LAYERS, POLICIES, TOKENS, contents, kept_of, record, records_of

from learnkv.cli.parser import parse
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.html import page as written
from learnkv.evaluation.html.charts import kl_of, pareto_charts
from learnkv.evaluation.html.heat import budget_maps, needle_maps
from learnkv.evaluation.html.page import page, page_data
from learnkv.evaluation.html.tables import differences, task_table
from learnkv.evaluation.html.viewer import samples
from learnkv.evaluation.kept_entries import VIEW, packed, unpacked
from learnkv.evaluation.panels import panels, score_of
from learnkv.evaluation.results import paired_difference, rows_of
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.typed_command import typed_command


def data_of(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_page_is_one_file_that_loads_nothing() -> None:
    text = page(contents())
    without_library = re.sub(r'(?s)<script type="text/plain" id="plotly">.*?</script>', "", text)
    assert "default-src 'none'" in without_library
    assert not re.search(r"<(script|img|link|iframe)[^>]*\s(src|href)=", without_library)
    assert not re.search(r"https?://|url\(|@import", without_library)
    assert len(text) < 2_200_000


def test_texts_stay_data_whatever_they_contain() -> None:
    text = page(contents(title=f"T {HOSTILE}", model=HOSTILE))
    assert HOSTILE not in text
    assert "<img" not in text
    data = data_of(text)
    assert data["model"] == HOSTILE
    assert HOSTILE in data["samples"][0]["after"]


def test_a_number_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="JSON"):
        page(contents(environment={"torch": float("nan")}))


def test_samples_that_make_the_page_too_large_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = page(contents())
    sizes = [len(json.dumps(sample, separators=(",", ":"))) for sample in data_of(whole)["samples"]]
    monkeypatch.setattr(written, "MOST_BYTES", len(whole.encode()) - sizes[-1] // 2)
    text = page(contents())
    data = data_of(text)
    assert len(data["samples"]) == len(sizes) - 1
    assert data["notes"][-1].startswith(f"1 of {len(sizes)} samples are left out")
    assert len(text.encode()) < written.MOST_BYTES + 200  # the note itself


def test_the_table_has_every_row_unrounded() -> None:
    rows = rows_of(records_of())
    table = task_table(rows)
    keys = [column["key"] for column in table["columns"]]
    assert len(table["rows"]) == len(rows)
    for cells, row in zip(table["rows"], rows, strict=True):
        shown = dict(zip(keys, cells, strict=True))
        for key in ("policy", "task", "length", "bytes", "n", "score", "stderr", "score_full", "kl", "precision"):
            assert shown[key] == row[key]
        assert shown["budget"] == ("everything" if row["policy"] == "full" else f"keep {row['keep']:g}")
    assert "peak_bytes" not in keys  # nothing was measured


def test_charts_have_means_bytes_and_errors_and_are_plotly_figures() -> None:
    rows = rows_of(records_of())
    charts = pareto_charts(rows)
    by_panel = panels(rows)
    assert [chart["title"] for chart in charts] == [f"{panel.title}, {panel.length:,} tokens" for panel in by_panel]
    for chart, (panel, chosen) in zip(charts, by_panel.items(), strict=True):
        go.Figure(chart["figure"])  # an unknown attribute raises
        traces = {trace["name"]: trace for trace in chart["figure"]["data"]}
        assert traces.keys() - {"full cache"} == POLICIES.keys()
        for name in POLICIES:
            for place, keep in enumerate((0.5, 0.1)):
                cell = [row for row in chosen if row["policy"] == name and row["keep"] == keep]
                value = kl_of(cell) if panel.kind == "text" else score_of(cell)
                assert traces[name]["y"][place] == value.mean
                assert traces[name]["error_y"]["array"][place] == value.stderr
                assert traces[name]["x"][place] == cell[0]["bytes"]
        if panel.kind != "text":
            assert traces["full cache"]["y"] == [score_of([r for r in chosen if r["policy"] == "full"]).mean]
    assert charts[-1]["figure"]["layout"]["yaxis"]["type"] == "log"


def test_budgets_in_bytes_have_charts_of_their_own() -> None:
    records = records_of()
    for each in records:
        if each["policy"] != "full":
            each |= {"bytes_budget": each["keep"], "keep": None, "asked_bytes": each["bytes"]}
    charts = pareto_charts(rows_of(records))
    (trace,) = (trace for trace in charts[1]["figure"]["data"] if trace["name"] == "snapkv")
    assert trace["x"] == [0.5, 0.1]
    assert "part of the full cache's bytes" in charts[1]["figure"]["layout"]["xaxis"]["title"]["text"]


def test_a_kl_of_zero_has_no_place_on_a_logarithmic_axis() -> None:
    records = [{**each, "kl": 0.0} if each["policy"] == "snapkv" and "kl" in each else each for each in records_of()]
    (trace,) = (t for t in pareto_charts(rows_of(records))[-1]["figure"]["data"] if t["name"] == "snapkv")
    assert trace["y"] == [None, None]


def test_differences_are_the_paired_ones_of_every_two_policies() -> None:
    records = records_of()
    found = {panel["title"]: panel for panel in differences(records)}
    panel = found["Query-agnostic: the question is read after compression, 1,024 tokens"]
    names, budgets = panel["policies"], panel["budgets"]
    assert (names, budgets, panel["value"]) == (["full", *POLICIES], ["keep 0.5", "keep 0.1"], "score")
    assert len(panel["cells"]) == 6 * 2
    chosen = [
        r for r in records if r["length"] == 1024 and r["metric"] == "generated" and r["setting"][6:] == "agnostic"
    ]
    for first, second, budget, *cell in panel["cells"]:
        sides = [
            [r for r in chosen if r["policy"] == names[n] and (n == 0 or f"keep {r['keep']:g}" == budgets[budget])]
            for n in (first, second)
        ]
        assert cell == list(paired_difference(*sides))
    text = found["Text, 1,024 tokens"]
    assert (text["value"], text["digits"]) == ("kl", 4)


def test_one_sample_has_a_difference_without_a_standard_error() -> None:
    records = [record(policy, keep, "vt", 0) for policy, keep in (("full", 1.0), ("snapkv", 0.5))]
    assert differences(records)[0]["cells"] == [[0, 1, 0, 30.0, None, 1]]
    assert page_data(contents(records=records, rows=rows_of(records)))["table"]["rows"]


def test_needles_are_mapped_by_depth_and_length() -> None:
    (part,) = needle_maps(records_of())
    assert part["title"] == "needle grid single, query agnostic"
    assert [(m["policy"], m["budget"]) for m in part["maps"][:2]] == [("full", "all"), ("learned-tiny", "keep 0.5")]
    assert part["maps"][0]["lengths"] == [512, 1024]
    assert part["maps"][0]["depths"] == [0, 50, 100]
    assert part["maps"][0]["scores"] == [[0.0, 100.0]] * 3


def test_budgets_are_those_of_all_prompts_or_of_the_shown_ones() -> None:
    records = records_of()
    maps = {(m["policy"], m["budget"], m["setting"]): m for m in budget_maps(records)}
    shown = maps["snapkv", "keep 0.1", "query-agnostic"]
    assert shown["n"] == 4  # two prompts of vt and two of text
    assert shown["kept"] == np.round(kept_of("snapkv", 0.1).mean(-1), 4).tolist()
    assert shown["bits"] is None
    assert maps["adakv@4", "keep 0.1", "query-agnostic"]["bits"] == [[4.5] * HEADS] * LAYERS
    own = [{**r, "budgets": [[0.25] * HEADS] * LAYERS} if r["policy"] == "snapkv" else r for r in records]
    mine = {(m["policy"], m["budget"], m["setting"]): m for m in budget_maps(own)}[
        "snapkv", "keep 0.1", "query-agnostic"
    ]
    assert mine["kept"] == [[0.25] * HEADS] * LAYERS
    assert mine["n"] == sum(
        r["policy"] == "snapkv" and r["keep"] == 0.1 and r["setting"][6:] == "agnostic" for r in own
    )


def test_bits_of_heads_without_entries_are_left_out_of_means() -> None:
    shape = {"shape": [1, 2, 8], "kept": packed(np.ones((1, 2, 8), dtype=bool))}
    views = [{**shape, "bits": [[bits, None]]} for bits in (4.0, 8.0)]
    records = [{**record("snapkv", 0.5, "niah_single_1", n), VIEW: view} for n, view in enumerate(views)]
    assert budget_maps(records)[0]["bits"] == [[6.0, None]]
    everywhere = [{**each, "bits": [[2.0, 0.0]]} for each in records]  # of all prompts; 0: no entries
    assert budget_maps(everywhere)[0]["bits"] == [[2.0, None]]


def test_samples_have_every_answer_and_what_was_kept() -> None:
    found = samples(records_of())
    assert [sample["title"] for sample in found][:2] == [
        "vt, 1,024 tokens, query-agnostic, generated, prompt 0",
        "vt, 1,024 tokens, query-agnostic, generated, prompt 1",
    ]
    sample = found[0]
    assert len(sample["tokens"]) == TOKENS
    assert sample["expected"] == ["4817293"]
    assert [(a["policy"], a["budget"]) for a in sample["answers"]][:3] == [
        ("full", "everything"),
        ("learned-tiny", "keep 0.5"),
        ("learned-tiny", "keep 0.1"),
    ]
    assert sample["answers"][0]["kept"] is None
    assert (unpacked(sample["answers"][2]) == kept_of("learned-tiny", 0.1)).all()
    unscored = samples(records_of(), scored=False)[0]
    assert unscored["expected"] is None
    assert {answer["score"] for answer in unscored["answers"]} == {None}


def test_a_prompt_whose_full_cache_has_no_view_is_no_sample() -> None:
    records = records_of()
    for each in records:
        if each["policy"] == "full" and each["index"] == 0:
            each.pop(VIEW, None)
    assert all(sample["title"].endswith("prompt 1") for sample in samples(records))


def test_the_command_gives_the_configuration() -> None:
    keys = {"ckpt": ("my runs/a", "snapkv"), "keep": (0.25, 0.1), "tasks": ("vt",), "text": "it's.txt"}
    config = EvalConfig(**keys, suite=SuiteKeys(depths=(0, 100)), lengths=(64,))
    command = typed_command("learnkv eval", config)
    assert "seed" not in command
    parsed, _ = parse(EvalConfig, shlex.split(command)[2:], "eval")
    assert parsed == config
