"""The page of all methods, and the picture of the main result."""

import re
from pathlib import Path

import pytest

from learnkv import allocators, load_policy, pages, scorers
from learnkv.persistence.methods import method, method_names, select_methods, status_of
from tools import methods, result_picture

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def page() -> str:
    return methods.page()


def test_every_method_has_a_row_with_its_paper(page: str) -> None:
    rows = {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)`.*$", page, re.MULTILINE)}
    names = {path.stem for path in (ROOT / "configs" / "policies").glob("*.yaml")}
    assert names <= rows.keys()
    assert "2404.14469" in rows["snapkv"]
    assert "last 32 queries" in rows["snapkv"]
    assert "a second time" in rows["kvzip"]
    assert "arxiv" not in rows["random"]


def test_every_method_has_its_kinds(page: str) -> None:
    """As its classes say, in the words that `baselines=` takes."""
    kinds = {
        row[1]: set(re.findall(r"`(\w+)`", row[2]))
        for row in re.finditer(r"^\| `(\w+)`\S* \| (.*?) \|", page, re.MULTILINE)
    }
    for name in select_methods():
        assert kinds[name] == method(name).kinds - {"observation_window"}
    assert kinds["fast_kvzip"] == {"trained", "calibrated"}
    assert kinds["snapkv"] == set()


def test_every_method_has_its_status(page: str) -> None:
    """As its classes say, which tests/test_golden.py compares with the golden files."""
    status = {row[1]: row[2] for row in re.finditer(r"^\| `(\w+)`\S* \| .*? \| (.*?) \|", page, re.MULTILINE)}
    for name in method_names():
        assert status[name] == methods.STATUS[status_of(load_policy(name))]
    assert [status[name] for name in ("snapkv", "turboquant", "snapstream", "kvec", "random")] == [
        "original's numbers",
        "numbers of a port",
        "description",
        "abstract",
        "–",
    ]


@pytest.mark.parametrize(("part", "module"), [("scorer", scorers), ("allocator", allocators), ("pages", pages)])
def test_every_class_has_a_section_with_its_options(page: str, part: str, module: object) -> None:
    names = set(module.__all__) - set(methods.ABSTRACT)  # type: ignore[attr-defined]
    assert all(f"{{ #{part}-{name.lower()} }}" in page for name in names)
    sections = page.split("\n### ")
    (snapkv,) = (section for section in sections if section.startswith("SnapKV "))
    assert "| `window` | `32` | number of" in snapkv
    assert "differs" in snapkv


def test_every_option_is_described(page: str) -> None:
    assert not re.findall(r"^\| `\w+` \| \S+ \|  \|$", page, re.MULTILINE)


def test_links_within_the_page_lead_somewhere(page: str) -> None:
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) <= set(re.findall(r"\{ #([\w-]+) \}", page))


def test_plain_text_is_no_markdown() -> None:
    assert methods._prose("score_j = a*b [B] <x> `c_d*`, arXiv 2404.14469") == (
        r"score\_j = a\*b \[B\] \<x\> `c_d*`, [arXiv 2404.14469](https://arxiv.org/abs/2404.14469)"
    )


def test_the_picture_has_a_line_per_policy() -> None:
    rows = result_picture.read(ROOT / "docs" / "results" / "study.json", ["main", "text"])
    scores, losses = result_picture.picture(rows, ["learned", "kvzip"]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in scores.get_lines()}
    assert lines["learned"][0] == pytest.approx(72.3, abs=0.1)
    assert lines["kvzip"][2] == pytest.approx(92.0, abs=0.1)
    assert scores.get_yscale() == "linear"
    assert losses.get_title() == result_picture.TITLES["text"]
