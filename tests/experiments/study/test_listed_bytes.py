"""A study under budgets of bytes, as it is typed, on a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.study.__main__ import main
from experiments.study.comparison import Comparison
from experiments.study.config import StudyConfig
from experiments.study.listed.criteria import GENERATED, MAIN, PARTS, TEXT
from learnkv.cli.parser import parse
from learnkv.errors import UserError
from learnkv.evaluation import measured_jobs

LISTED = """
choice: {policies: [baselines], tasks: [vt], lengths: [400], bytes: [0.4, 0.2], precision: [16, K4V2], samples: 1,
  seed: 43}
needles: {policies: [learned, uniform, best], best: 2, tasks: [vt], lengths: [400], bytes: [0.4, 0.2],
  precision: [8, 4], samples: 2}
"""


@pytest.fixture
def listed(words: list[str], tmp_path: Path) -> list[str]:
    file = tmp_path / "tiny.yaml"
    keys = yaml.safe_load(file.read_text())
    more = {"uniform": keys["learned"], "name": "bytes", "single": [], "baselines": ["snapkv", "knorm"]}
    file.write_text(yaml.safe_dump({**keys, **more, "comparisons": yaml.safe_load(LISTED)}))
    return words


def test_comparisons_of_bytes_are_measured_once_and_written_under_their_name(
    listed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(listed) == 0
    docs = tmp_path / "docs"
    names = {"bytes.md", "bytes.json", "bytes-samples.jsonl.gz", "bytes-pareto.png", "bytes-budgets.png"}
    assert {file.name for file in docs.iterdir()} == names
    report = json.loads((docs / "bytes.json").read_text())
    choice, needles = (report["rows"][name] for name in ("choice", "needles"))
    methods = {f"{name}@{precision}" for name in ("snapkv", "knorm") for precision in ("16", "K4V2")}
    assert {row["policy"] for row in choice} == {"full", "full@K4V2", *methods}
    total = {name: sum(row["kl"] for row in choice if row["policy"] == name) for name in methods}
    best = sorted(methods, key=lambda name: total[name])[:2]
    own = {"learned", "learned@8", "learned@4", *best}
    assert {row["policy"] for row in needles} == {"full", "full@8", "full@4", *own}
    for row in needles:
        if row["policy"] in own:
            assert (row["keep"], row["metric"], row["n"]) == (None, "forced", 2)
            assert row["bytes"] <= row["asked_bytes"] <= row["bytes_budget"] * row["bytes_full"]
    precisions = {row["policy"]: row["precision"] for row in needles}
    assert (precisions["learned"], precisions["learned@4"], precisions["full@8"]) == ("16", "4", "8")
    page = (docs / "bytes.md").read_text()
    assert "| KL (exact %) | prompts | bytes 0.4 | bytes 0.2 |" in page or "| KL | prompts | bytes 0.4" in page
    assert "full@4 keeps every entry, in " in page
    assert {line["verdict"] for line in report["must_hold"]} <= {"not measured", "met", "missed"}
    assert "needles and chains: readings of the prompt" in page
    capsys.readouterr()
    monkeypatch.setattr(measured_jobs, "prefill", lambda *_, **__: 1 / 0)
    assert main(listed) == 0
    assert capsys.readouterr().err.count(" 0 to measure") == 2
    assert (docs / "bytes.md").read_text() == page


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"bytes": (0.1,), "keep": (0.1,)}, "keep=0.1 bytes=0.1: expected one of them"),
        ({"bytes": (1.1,)}, "bytes=1.1: expected a fraction"),
        ({"precision": (4,)}, "precision=4: expected baselines or uniform"),
        ({"precision": (5,), "policies": ("baselines",)}, "precision=5: expected 16"),
        ({"policies": ("uniform",)}, "policies=uniform: expected precision="),
    ],
)
def test_what_a_comparison_cannot_be_is_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        Comparison(**keys)
    assert str(refused.value).startswith(line)


def test_the_best_are_chosen_by_the_same_kind_of_budget() -> None:
    choice = Comparison(policies=("baselines",), keep=(0.1,))
    with pytest.raises(UserError, match="chosen_in=choice: expected budgets of the same kind"):
        StudyConfig(comparisons={"choice": choice, "needles": Comparison(bytes=(0.1,))})
    own = {"needles": Comparison(policies=("uniform",), precision=(4,))}
    with pytest.raises(UserError, match="policies=uniform: expected uniform="):
        StudyConfig(comparisons=own)


def test_the_shipped_list_has_what_criteria_are_about() -> None:
    config, _ = parse(StudyConfig, ["config=smollm2-bytes"], "study")
    assert {MAIN, GENERATED, TEXT, PARTS, "choice"} == set(config.comparisons)
    assert all(one.bytes == (0.05, 0.025, 0.0125) for one in config.comparisons.values())
    assert config.comparisons[GENERATED].samples >= 50
    seeds = {name: one.seed for name, one in config.comparisons.items()}
    assert seeds.pop("choice") not in seeds.values()
    assert (config.name, config.out) == ("bytes", "docs/results/smollm2")
