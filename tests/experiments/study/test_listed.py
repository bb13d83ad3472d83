"""A study that lists its comparisons, as it is typed, on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from experiments.study.__main__ import main
from experiments.study.config import StudyConfig
from experiments.study.listed.archive import FILE
from experiments.study.listed.criteria import LONGER, MAIN
from learnkv.cli.parser import parse
from learnkv.evaluation import measured_jobs


@pytest.fixture
def listed(words: list[str], tmp_path: Path) -> list[str]:
    """The tiny study with comparisons in place of its sequence."""
    file = tmp_path / "tiny.yaml"
    keys = yaml.safe_load(file.read_text())
    common = {"tasks": ["niah_single_1", "vt"], "lengths": [400], "keep": [0.25, 0.1], "samples": 2}
    keys["comparisons"] = {
        "choice": {**common, "policies": ["baselines"], "samples": 1, "seed": 43},
        "needles": {**common, "policies": ["learned", "best", "ablations"], "best": 2},
        "text": {**common, "policies": ["learned", "baselines"], "tasks": ["text"], "lengths": [200]},
        "generated": {**common, "score": "generated", "best": 1},
        "heat-map": {**common, "tasks": ["niah_single_1"], "lengths": [300, 400], "best": 1},
    }
    file.write_text(yaml.safe_dump({**keys, "single": []}))
    return words


def test_listed_comparisons_are_measured_once_and_written(
    listed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(listed) == 0
    docs = tmp_path / "docs"
    report = json.loads((docs / "study.json").read_text())
    rows = report["rows"]
    assert set(rows) == {"choice", "needles", "text", "generated", "heat-map"}
    others = {row["policy"] for row in rows["choice"]} - {"full"}
    assert others == {"snapkv", "knorm", "random"}
    mean_kl = {name: sum(row["kl"] for row in rows["choice"] if row["policy"] == name) for name in sorted(others)}
    best = sorted(mean_kl, key=lambda name: mean_kl[name])
    assert {row["policy"] for row in rows["needles"]} == {"full", "learned", *best[:2]}
    assert {row["policy"] for row in rows["generated"]} == {"full", "learned", best[0]}
    assert {row["metric"] for row in rows["generated"]} == {"generated"}
    assert {row["metric"] for row in rows["needles"]} == {"forced"}
    assert {row["length"] for row in rows["heat-map"]} == {300, 400}
    verdicts = {line["about"]: line["verdict"] for line in report["must_hold"]}
    assert (
        sum("query-agnostic needles" in about and verdict != "not measured" for about, verdict in verdicts.items()) == 2
    )
    page = (docs / "study.md").read_text()
    assert "## needles: query-agnostic, 400 tokens, forced" in page
    for name in ("study-pareto.png", "study-budgets.png", "study-needles.png"):
        assert (docs / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in page
    capsys.readouterr()
    monkeypatch.setattr(measured_jobs, "prefill", lambda *_, **__: 1 / 0)
    assert main(listed) == 0
    assert capsys.readouterr().err.count(" 0 to measure") == 5
    assert (docs / "study.md").read_text() == page

    # Another machine goes on with the samples in the results; a lost one is measured again.
    shutil.rmtree(tmp_path / "study" / "needles")
    assert main([*listed, "stages=measure"]) == 0
    assert capsys.readouterr().err.count(" 0 to measure") == 5
    assert main([*listed, "stages=write"]) == 0
    assert (docs / "study.md").read_text() == page

    # A larger portion goes on; what is not named waits.
    assert main([*listed, "stages=measure", "only=needles", "portion=0.5"]) == 0
    assert "needles: 14 samples, 0 taken over, 0 to measure" in (said := capsys.readouterr().err)
    assert "choice:" not in said
    (docs / FILE).write_bytes(b"no samples")
    assert main(listed) == 2
    assert f"{FILE}: expected samples of a study" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_list_cannot_do_is_one_line(
    listed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    keys = yaml.safe_load(file.read_text())
    keys["comparisons"]["needles"]["chosen_in"] = "choise"
    assert main([*listed, "only=needle"]) == 2
    assert "only=needle: expected one of choice, generated" in capsys.readouterr().err.splitlines()[-1]
    assert main([*listed, "portion=0"]) == 2
    assert "portion=0: expected above 0" in capsys.readouterr().err.splitlines()[-1]
    file.write_text(yaml.safe_dump(keys))
    assert main(listed) == 2
    assert "comparisons.needles.chosen_in=choise: expected a comparison" in capsys.readouterr().err.splitlines()[-1]


def test_the_shipped_list_has_what_criteria_are_about() -> None:
    config, _ = parse(StudyConfig, ["config=smollm2"], "study")
    assert {MAIN, "generated", "text", "query-aware", *LONGER} <= set(config.comparisons)
    seeds = {name: one.seed for name, one in config.comparisons.items()}
    assert seeds.pop("choice") not in seeds.values()
