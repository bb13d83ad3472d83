"""The benchmark of decode steps on a CPU: its interval, its order of turns, and that it runs."""

import json
from pathlib import Path

import pytest

from benchmarks import cpu_decode
from benchmarks.cpu_decode import FULL, TENTH, THEIRS

ROOT = Path(__file__).parents[2]


def test_the_interval_is_that_of_order_statistics() -> None:
    """Of 20 values the 6th and the 15th: with fewer than 6 below the median in 2.07 % of all cases."""
    assert cpu_decode.interval([float(value) for value in range(20, 0, -1)]) == {"median": 10.5, "low": 6, "high": 15}
    assert cpu_decode.interval([3.0, 1.0, 2.0]) == {"median": 2, "low": 1, "high": 3}


def test_every_second_round_is_reversed() -> None:
    order: list[str] = []
    spent = cpu_decode.in_turns({name: lambda name=name: order.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert [len(seconds) for seconds in spent.values()] == [3, 3, 3]


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dry-run", "--pairs", "2", "--new", "3", "--dtypes", "float32", "--out", str(tmp_path / "x.json")]
    cpu_decode.main(words)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["impl"] for row in rows] == [THEIRS, FULL, TENTH]
    assert all(row["floor_ms"] > 0 and row["cpu_ms"] > 0 for row in rows)
    assert rows[2]["floor_ms"] < rows[1]["floor_ms"] == rows[0]["floor_ms"]
    assert "cpu_ratio" not in rows[0]
    assert len(cpu_decode.too_slow([{"cpu_ratio": {"high": high}} for high in (1.0, 1.03, 1.04)])) == 1
    assert "| 2 x 64 | float32 | learnkv 0.1 |" in capsys.readouterr().out


def test_the_table_of_the_page_is_that_of_the_files() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    files = sorted((ROOT / "benchmarks" / "results" / "cpu").glob("decode-*.json"))
    assert files
    for file in files:
        assert set(cpu_decode.table(json.loads(file.read_text(encoding="utf-8"))["rows"])) <= set(page)
