"""The notebooks in examples/ run as scripts, away from the repository, and show what they say."""

import re
from pathlib import Path

import pytest
from support.forked import run_program

import learnkv  # noqa: F401, before the forks: each would import it

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = [
    "compress_and_ask",
    "read_once_ask_often",
    "keep_the_system_prompt",
    "lossless_decoding",
    "train_a_policy",
    "add_a_method",
]


def output_of(name: str, folder: Path) -> str:
    """What a notebook prints."""
    return run_program(EXAMPLES / f"{name}.py", folder)


@pytest.mark.slow
def test_compress_and_ask(tmp_path: Path) -> None:
    shown = output_of("compress_and_ask", tmp_path)
    (full,) = map(int, re.findall(r"full cache: (\d+) bytes", shown))
    rows = {name: (int(size), answer) for name, size, answer in re.findall(r"(\w+): (\d+) bytes, answers (.*)", shown)}
    assert set(rows) == {"reference", "kvzip", "snapkv", "streaming_llm"}
    assert all(size < 0.12 * full for size, _ in rows.values())
    assert "4817293" in rows["reference"][1]
    assert "4817293" not in rows["streaming_llm"][1]
    assert re.search(r"^Ben 7720815", shown, re.MULTILINE)


@pytest.mark.slow
def test_read_once_ask_often(tmp_path: Path) -> None:
    shown = output_of("read_once_ask_often", tmp_path)
    (kept,) = map(int, re.findall(r"(\d+) of \d+ bytes kept", shown))
    (stored,) = map(int, re.findall(r"on disk: (\d+) bytes", shown))
    assert kept < stored < kept + 16_000
    assert "Ada: 4817293" in shown
    assert "Ben: 7720815" in shown
    assert "same tokens before and after: True" in shown


@pytest.mark.slow
def test_keep_the_system_prompt(tmp_path: Path) -> None:
    shown = output_of("keep_the_system_prompt", tmp_path)
    rows = dict(re.findall(r"protect=(\w+): (.*)", shown))
    assert "4817293" in rows["system"]
    assert "4817293" not in rows["None"]
    sizes = [row.split(", answers")[0] for row in rows.values()]
    assert sizes[0] == sizes[1]  # bytes and entries
    assert "named by hand: True" in shown
    assert "kept after password: 7720815 True" in shown


@pytest.mark.slow
def test_lossless_decoding(tmp_path: Path) -> None:
    shown = output_of("lossless_decoding", tmp_path)
    rows = dict(re.findall(r"(\w+): the same, ([\d.]+) of 4 accepted", shown))
    assert set(rows) == {"reference", "snapkv", "streaming_llm", "random"}
    assert float(rows["reference"]) > 2 > float(rows["random"])
    assert re.search(r"^Ben 7720815", shown, re.MULTILINE)


@pytest.mark.slow
def test_train_a_policy(tmp_path: Path) -> None:
    losses = dict(re.findall(r"(\w+): ([\d.]+) nats per token", output_of("train_a_policy", tmp_path)))
    assert 0 < float(losses["trained"]) < float(losses["snapkv"])


@pytest.mark.slow
def test_add_a_method(tmp_path: Path) -> None:
    shares = dict(re.findall(r"([\w+ ]+): ([\d.]+) of the number", output_of("add_a_method", tmp_path)))
    named = {name.strip(): float(share) for name, share in shares.items()}
    assert named["novelty"] > named["random"] + 0.1
    assert len(named) == 5


def test_all_are_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_notebooks(name: str) -> None:
    jupytext = pytest.importorskip("jupytext")
    cells = jupytext.read(EXAMPLES / f"{name}.py").cells
    assert [cell.cell_type for cell in cells[:2]] == ["markdown", "code"]
    assert cells[0].source.startswith("# ")
    assert len(cells) > 6
    assert all(cell.source.strip() for cell in cells)
