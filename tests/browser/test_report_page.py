"""`report.html` in a real browser: tabs, sorting, filters, charts, the sample viewer, keyboard, narrow and dark."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.opened import NARROW, Opened
from support.page import HOSTILE, LAYERS, POLICIES, TOKENS, contents, kept_of, records_of

from learnkv.evaluation.html.page import write_page
from learnkv.evaluation.results import rows_of

pytestmark = pytest.mark.browser
Open = Callable[..., Opened]
TABS = ["Overview", "Tasks", "Heat maps", "Differences", "Samples", "About"]
PARTS = ["overview", "tasks", "maps", "differences", "samples", "about"]


def column(opened: Opened, label: str) -> list[str]:
    place = opened.texts("#rows th").index(label) + 1
    return opened.texts(f"#rows tbody td:nth-child({place})")


def shaded(opened: Opened, pane: int) -> list[float]:
    """Shade of every token, 0 to 1."""
    script = "(spans) => spans.map((span) => Number(span.style.getPropertyValue('--share')))"
    return opened.page.locator(f".pane:nth-child({pane + 1}) .tokens span").evaluate_all(script)


def kept(opened: Opened, pane: int) -> list[bool]:
    return [shade > 0 for shade in shaded(opened, pane)]


def test_it_opens_from_the_disk_and_tabs_follow_mouse_and_keyboard(opened: Open) -> None:
    report = opened()
    assert report.texts("[role=tab]") == TABS
    assert report.selected() == "Overview"
    report.page.click("text=Differences")
    assert report.selected() == "Differences"
    for key, tab in (("ArrowRight", "Samples"), ("End", "About"), ("ArrowRight", "Overview"), ("ArrowLeft", "About")):
        report.page.keyboard.press(key)
        assert report.selected() == tab
        assert report.page.evaluate("document.activeElement.textContent") == tab
    report.page.keyboard.press("Home")
    report.page.keyboard.press("Tab")  # from the tab into its section, not to the next tab
    assert report.page.evaluate("document.activeElement.id") == "overview"
    assert opened("tasks").selected() == "Tasks"  # an address with a tab
    assert opened("nonsense").selected() == "Overview"


def test_texts_of_the_data_are_never_markup(opened: Open) -> None:
    report = opened("about")
    assert HOSTILE in report.texts("#notes li")[0]
    assert report.page.title() == "Compressed caches of tiny"
    assert report.page.locator("main img").count() == 0


def test_charts_are_drawn_with_error_bars_and_every_policy(opened: Open) -> None:
    report = opened()
    report.page.wait_for_function("document.querySelectorAll('#pareto .main-svg').length >= 4")
    assert set(report.texts("#pareto .chart >> nth=1 >> .legendtext")) == {"full cache", *POLICIES}
    assert report.page.locator("#pareto .chart >> nth=2 >> .errorbar").count() == 1 + 2 * len(POLICIES)
    data = report.page.evaluate("document.querySelectorAll('#pareto .chart')[1].data.map((t) => [t.name, t.y])")
    assert dict(data)["snapkv"] == pytest.approx([75.833333, 55.833333])


def test_rows_are_sorted_by_every_column_and_both_ways(opened: Open) -> None:
    report = opened("tasks")
    before = column(report, "score")
    report.page.click("#rows th >> text=/^score$/")
    falling = [float(text) for text in column(report, "score")]
    assert falling == sorted(map(float, before), reverse=True)
    assert report.page.get_attribute("#rows th:has(button:text-is('score'))", "aria-sort") == "descending"
    report.page.keyboard.press("Enter")  # the heading has the focus
    assert [float(text) for text in column(report, "score")] == falling[::-1]
    report.page.click("#rows th >> text=/^bytes$/")
    assert column(report, "bytes")[0] == "2 MB"  # by value: 200 kB is less
    report.page.click("#rows th >> text=/^policy$/")
    assert column(report, "policy") == sorted(column(report, "policy"))
    report.page.click("#rows th >> text=/^KL$/")
    numbers = [text for text in column(report, "KL") if text != "–"]
    assert column(report, "KL")[: len(numbers)] == numbers  # missing ones are last
    report.page.keyboard.press("Enter")
    assert column(report, "KL")[: len(numbers)] == numbers[::-1]


def test_rows_are_filtered_by_words_and_by_choices(opened: Open) -> None:
    report = opened("tasks")
    everything = len(rows_of(records_of()))
    assert report.page.inner_text("#count") == f"{everything} of {everything} rows"
    report.page.fill("#search", "SNAP niah")
    assert set(column(report, "policy")) == {"snapkv"}
    assert set(column(report, "task")) == {"niah_single_1"}
    report.page.fill("#search", "")
    report.page.select_option("#filter-task", "vt")
    report.page.select_option("#filter-setting", "query-aware")
    report.page.select_option("#filter-budget", "keep 0.1")
    assert column(report, "policy") == list(POLICIES)
    assert report.page.inner_text("#count") == f"{len(POLICIES)} of {everything} rows"
    report.page.select_option("#filter-budget", "")
    assert len(column(report, "policy")) == 1 + 2 * len(POLICIES)
    report.page.fill("#search", "nothing has this")
    assert column(report, "policy") == []


def test_heat_maps_of_needles_budgets_and_bits(opened: Open) -> None:
    report = opened("maps")
    report.page.wait_for_selector("#budgets .hm")
    assert report.texts("#needles figcaption") == ["full cache", *(f"{name}, keep 0.5" for name in POLICIES)]
    report.page.select_option("#needle-controls select >> nth=1", "keep 0.1")
    assert report.texts("#needles figcaption")[1] == "learned-tiny, keep 0.1"
    report.page.select_option("#budget-policy", "adakv@4")
    report.page.wait_for_function("document.querySelectorAll('#budgets .budget .hm').length === 2")
    assert report.texts("#budgets figcaption")[1] == "Bits per stored number, scales included"
    drawn = report.page.evaluate("[...document.querySelectorAll('#budgets .budget')].map((chart) => chart.data[0].z)")
    assert drawn[0] == np.round(kept_of("adakv@4", 0.5).mean(-1), 4).tolist()
    assert drawn[1] == [[4.5, 4.5]] * LAYERS


def test_differences_change_their_sign_with_the_side(opened: Open) -> None:
    report = opened("differences")

    def shown() -> dict[str, list[str]]:
        rows = [row.split("\t") for row in report.page.inner_text("#pairs tbody").splitlines()]
        return {row[0]: row[1:] for row in rows}

    report.page.select_option(
        "#difference-controls select >> nth=0",
        label="Query-aware: the question is compressed with the context, 1,024 tokens",
    )
    assert shown()["learned-tiny"] == ["-20.0 ± 0.0 (4)", "-40.0 ± 0.0 (4)"]
    report.page.select_option("#minus", label="learned-tiny")
    assert shown() == {
        "full": ["+20.0 ± 0.0 (4)", "+40.0 ± 0.0 (4)"],
        "snapkv": ["-10.0 ± 0.0 (4)", "-20.0 ± 0.0 (4)"],
        "adakv@4": ["-20.0 ± 0.0 (4)", "-40.0 ± 0.0 (4)"],
    }
    assert "minus that of learned-tiny" in report.page.inner_text("#difference-about")
    report.page.select_option("#difference-controls select >> nth=0", label="Text, 1,024 tokens")
    assert "KL" in report.page.inner_text("#difference-about")
    assert report.page.locator("#minus").input_value() == "1"  # the same policy as before


def test_the_viewer_shows_question_answers_and_exactly_what_was_kept(opened: Open) -> None:
    report = opened("samples")
    assert HOSTILE in report.page.inner_text("#question")
    assert "4817293" in report.page.inner_text("#question")
    report.page.select_option("#left", label="snapkv, keep 0.5")
    report.page.select_option("#right", label="adakv@4, keep 0.1")
    assert "snapkv answers 4817293" in report.page.inner_text(".pane:nth-child(1)")
    assert "score 10 · 200 kB of 2 MB · 10.0 %" in report.page.inner_text(".pane:nth-child(2)")
    for pane, (policy, keep) in enumerate((("snapkv", 0.5), ("adakv@4", 0.1))):
        expected = kept_of(policy, keep)
        assert kept(report, pane) == expected.any((0, 1)).tolist()
        shades, counts = np.array(shaded(report, pane)), expected.sum((0, 1))
        order = [np.unique(shades[counts == count]).tolist() for count in sorted(set(counts.tolist()))]
        assert all(len(level) == 1 for level in order)  # alike where equally many heads kept them,
        assert order == sorted(order)  # and darker where more did
    report.page.select_option("#left", label="full cache")
    assert set(shaded(report, 0)) == {1.0}


def test_layers_and_heads_are_chosen_by_list_by_map_and_by_key(opened: Open) -> None:
    report = opened("samples")
    report.page.select_option("#left", label="snapkv, keep 0.5")
    whole = kept_of("snapkv", 0.5)
    report.page.select_option("#sample-layer", "0")
    report.page.select_option("#sample-head", "0")
    assert kept(report, 0) == whole[0, 0].tolist()
    assert report.page.inner_text("#scale-end") == "kept"
    report.page.click(".pane:nth-child(1) .heads i[title^='layer 1, head 1']")
    assert (report.page.input_value("#sample-layer"), report.page.input_value("#sample-head")) == ("1", "1")
    assert kept(report, 0) == whole[1, 1].tolist()
    report.page.focus("#samples")
    for key, layer, head in (("l", "2", "1"), ("Shift+L", "1", "1"), ("h", "1", "all"), ("h", "1", "0")):
        report.page.keyboard.press(key)
        assert (report.page.input_value("#sample-layer"), report.page.input_value("#sample-head")) == (layer, head)
    assert kept(report, 0) == whole[1, 0].tolist()


def test_samples_sides_and_tokens_are_reached_by_key(opened: Open) -> None:
    report = opened("samples")
    report.page.select_option("#left", label="snapkv, keep 0.5")
    report.page.select_option("#right", label="full cache")
    report.page.focus("#samples")
    report.page.keyboard.press("x")
    assert report.page.locator("#left option:checked").inner_text() == "full cache"
    report.page.keyboard.press("n")
    assert report.page.input_value("#sample-sample") == "1"
    assert report.page.locator("#right option:checked").inner_text() == "snapkv, keep 0.5"  # stays with the new sample
    report.page.keyboard.press("p")
    report.page.keyboard.press("p")
    assert report.page.input_value("#sample-sample") == str(report.page.locator("#sample-sample option").count() - 1)
    report.page.keyboard.press("n")
    report.page.focus(".pane:nth-child(1) .tokens")
    report.page.keyboard.press("End")
    counts = kept_of("snapkv", 0.5).sum((0, 1))
    line = report.page.inner_text("#token")
    assert line.startswith(f"token {TOKENS - 1} ")
    assert f"full cache: 8 of 8; snapkv, keep 0.5: {counts[-1]} of 8" in line
    report.page.keyboard.press("ArrowLeft")
    assert f"token {TOKENS - 2} " in report.page.inner_text("#token")
    assert report.page.locator(".tokens span.here").count() == 2  # in both panes
    report.page.hover(".pane:nth-child(2) .tokens span >> nth=3")
    assert f'token 3 " word0" · heads that kept it, full cache: 8 of 8; snapkv, keep 0.5: {counts[3]}' in (
        report.page.inner_text("#token")
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_on_a_narrow_screen_and_in_the_dark(opened: Open, scheme: str) -> None:
    report = opened(viewport=NARROW, color_scheme=scheme)
    for part in PARTS:
        report.page.click(f"#tab-{part}")
        assert report.page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    report.page.click("#tab-samples")
    boxes = [report.page.locator(f".pane:nth-child({number})").bounding_box() for number in (1, 2)]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one below the other
    assert min(box["width"] for box in boxes) > 350
    for selector in ("body", ".hint", ".tokens span.evicted", "#question dt", "[role=tab]", ".facts", ".pane .answer"):
        assert contrast(report, selector) >= 4.5, selector
    assert contrast(report, ".tokens span:not(.evicted)", "--kept") >= 4.5


def contrast(opened: Opened, selector: str, ground: str = "") -> float:
    """WCAG's contrast of an element's text with what is behind it, or with a colour of the page."""
    script = """([selector, ground]) => {
      const shown = document.querySelector(selector);
      const probe = document.createElement("i");
      document.body.append(probe);
      const rgb = (colour) => {
        probe.style.color = colour;
        return getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
      };
      let behind = shown;
      while (behind && rgb(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
      const below = ground ? `var(${ground})` : getComputedStyle(behind ?? document.body).backgroundColor;
      const found = [rgb(getComputedStyle(shown).color), rgb(below)].map((colour) => colour.slice(0, 3));
      probe.remove();
      return found;
    }"""
    colours = np.array(opened.page.evaluate(script, [selector, ground])) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    light, dark = sorted(linear @ [0.2126, 0.7152, 0.0722], reverse=True)
    return float((light + 0.05) / (dark + 0.05))


def test_a_page_of_one_text_begins_with_its_sample(opened: Open, tmp_path: Path) -> None:
    records = [each for each in records_of() if each["task"] == "vt"]
    file = write_page(tmp_path / "inspect.html", contents(records=records, rows=(), scored=False, notes=()))
    report = opened(file=file)
    assert report.texts("[role=tab]") == ["Heat maps", "Samples", "About"]
    assert report.selected() == "Samples"
    assert "score" not in report.page.inner_text(".pane:nth-child(1)")
    assert "Correct answer" not in report.page.inner_text("#question")


def test_a_page_without_a_finished_sample_says_so(opened: Open, tmp_path: Path) -> None:
    empty: dict[str, Any] = {"records": [], "rows": [], "notes": ()}
    report = opened(file=write_page(tmp_path / "empty.html", contents(**empty)))
    assert report.texts("[role=tab]") == ["About"]
    assert "0 samples" in report.page.inner_text("#summary")
