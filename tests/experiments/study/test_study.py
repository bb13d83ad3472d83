"""`python -m experiments.study` as it is typed, on a tiny model: once, then again, then from earlier samples."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from experiments.study.__main__ import main
from experiments.study.config import StudyConfig
from experiments.study.measure import differing
from experiments.study.variants import trainings
from learnkv.cli.parser import parse
from learnkv.evaluation import measured_jobs
from learnkv.evaluation.store import Store
from learnkv.persistence.named_configs import CONFIGS
from learnkv.scorers import KVzip


def test_a_study_trains_measures_writes_and_goes_on(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(words) == 0
    said = capsys.readouterr()
    assert "training learned-only" in said.err
    docs, folder = tmp_path / "docs", tmp_path / "study"
    held = json.loads((docs / "study.json").read_text())
    counts = {(row["policy"], row["setting"], row["keep"], row["task"]): row["n"] for row in held["rows"]["main"]}
    best = {name for (name, *_), n in counts.items() if n == 3} - {"full", "learned"}
    assert len(best) == 1
    assert best < {"snapkv", "knorm", "random"}
    assert {n for (name, *_), n in counts.items() if name == "learned"} == {3}
    assert {n for (name, *_), n in counts.items() if name == "learned-only"} == {2}
    often = {"snapkv", *best}  # what the learned ones start from, and what is best
    for (name, *_), n in counts.items():
        assert name.startswith("learned") or name == "full" or (n > 1) == (name in often)
    for keep in (0.5, 0.2):
        assert all(abs(row["spent"] - keep) < 0.01 for row in held["rows"]["main"] if row["keep"] == keep)
    assert set(held["rows"]) == {"main", "text", "memo", "german", "greek"}
    assert set(held["changed"]) == {"learned"}
    lines = {line["about"]: line["verdict"] for line in held["must_hold"]}
    assert (
        lines["soft/hard gap, changed set against what it starts from, marginal value per head: logged and drawn"]
        == "met"
    )
    assert sum("trained for this budget alone" in about for about in lines) == 1
    page = (docs / "study.md").read_text()
    assert "at commit 1234567" in page
    assert "learned minus the others" in page
    for name in ("study-pareto.png", "study-budgets.png", "study-variants.png", "study-marginal.png"):
        assert (docs / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in page

    # The same command again: nothing is trained or measured, and the page is the same.
    with monkeypatch.context() as patched:
        patched.setattr(measured_jobs, "prefill", lambda *_, **__: 1 / 0)
        assert main(words) == 0
    said = capsys.readouterr()
    assert said.err.count("finished before") == 2
    assert said.err.count(" 0 to measure") == 8
    assert (docs / "study.md").read_text() == page

    # A method that is left out leaves the tables, not the folder.
    assert main([*words, "stages=write", "baselines=snapkv,knorm"]) == 0
    assert "| random |" in page
    assert "random" not in (docs / "study.md").read_text()

    # Samples of an earlier comparison are taken over, those that are missing in it are measured.
    samples = Store(folder / "main" / "samples.jsonl").records
    gone = next(mark for mark, record in samples.items() if record["policy"] == "knorm")
    Store(tmp_path / "earlier.jsonl").add([record for mark, record in samples.items() if mark != gone])
    (tmp_path / "earlier").mkdir()
    shutil.move(tmp_path / "earlier.jsonl", tmp_path / "earlier" / "samples.jsonl")
    shutil.rmtree(folder / "main")
    assert main([*words, f"records={tmp_path / 'earlier'}"]) == 0
    assert [line.split(", ")[2] for line in capsys.readouterr().err.splitlines() if line.startswith("main: ")] == [
        "1 to measure",
        "0 to measure",
        "0 to measure",
    ]
    assert Store(folder / "main" / "samples.jsonl").records.keys() == samples.keys()

    # Without tasks it is the text alone.
    assert main([*words, "tasks=[]", f"output={tmp_path / 'text'}"]) == 0
    assert set(json.loads((docs / "study.json").read_text())["rows"]) == {"text"}


def test_what_is_missing_is_one_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "stages=measure"]) == 2
    assert "learned is not trained yet" in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "stages=write"]) == 2
    assert "nothing has been measured yet" in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "single=no/learned-such"]) == 2
    assert "config=no/learned-such" in capsys.readouterr().err.splitlines()[-1]
    assert main([*words, "baselines=knorm,snapkw"]) == 2
    assert "baselines=snapkw: expected all, a kind" in (error := capsys.readouterr().err)
    assert error.rstrip().endswith("did you mean snapkv?")
    (tmp_path / "mine.yaml").write_text("config: learned.yaml\n")
    assert main([*words, f"unseen={tmp_path / 'mine.yaml'}"]) == 2
    assert "mine: expected training YAMLs" in capsys.readouterr().err.splitlines()[-1]


def test_the_shipped_study_names_every_variant_and_every_method() -> None:
    config, _ = parse(StudyConfig, ["config=study"], "study")
    below = {f"study/{path.stem}" for path in (CONFIGS / "train" / "study").glob("*.yaml")}
    assert below == set(config.variants) - {"learned"}
    comparison = yaml.safe_load((CONFIGS / "eval" / "method_comparison.yaml").read_text())
    assert (list(config.baselines), list(config.tasks)) == (comparison["baselines"], comparison["tasks"])
    trained = ["dbtrimkv", "duo_attention", "fast_kvzip", "flux_attention", "indexmem", "trimkv"]
    assert sorted(config.trained) == trained
    assert differing("haystack", ["niah_single_1", "niah_single_2", "vt"]) == ("niah_single_2",)
    assert differing("greek", comparison["tasks"])[-1] == "niah_multiquery"


def test_the_text_protocol_fits_a_small_model() -> None:
    config, _ = parse(StudyConfig, ["config=text"], "study")
    ((keys, _),) = trainings(config).values()
    assert (keys.data.mixture.retrieval, keys.data.mixture.text, keys.data.lengths) == (0, 2, (128, 192))
    assert keys.data.lengths[1] + keys.data.continuation_tokens <= config.length
    assert 2 * config.length * 3 / 4 + KVzip().repetition.overlap < 512  # the last quarter is continued
    assert {"kvzip", "snapkv"} <= set(config.methods)
    assert not {"headkv", "quest", "h2o_decode"} & set(config.methods)
    assert (config.tasks, config.samples.text, config.samples.evaluated) == ((), 100, 200)


def test_variants_share_the_recipe_and_differ_in_what_they_are_named_for() -> None:
    config, _ = parse(StudyConfig, ["config=study"], "study")
    found = {name: keys for name, (keys, _) in trainings(config).items()}
    flat = {name: {**vars(keys), **vars(keys.data), **vars(keys.distillation)} for name, keys in found.items()}
    recipe, apart = (
        flat["learned"],
        {
            "learned-only-0.25": {"keep", "students"},
            "learned-only-0.1": {"keep", "students"},
            "learned-only-0.05": {"keep", "students"},
            "learned-text": {"mixture"},
            "learned-short": {"lengths"},
            "learned-without-niah": {"hold_out"},
            "learned-without-vt": {"hold_out"},
        },
    )
    shares = {f"learned-{name}": {"budget_lr"} for name in ("layer", "head", "both", "conditioned")}
    for name, keys in flat.items():
        changed = {
            key
            for key, value in keys.items()
            if key not in ("policy", "objective", "output", "data", "distillation") and value != recipe[key]
        }
        assert changed - {"keep_sampling"} == {**apart, **shares}.get(name, set())  # one fraction is not sampled
    specs = {name: keys.policy.spec() for name, keys in found.items()}
    switches = ("heads", "layers", "conditioned")
    assert all(specs[name] == specs["learned"] for name in apart)
    parts = {
        name: (
            specs[f"learned-{name}"]["scorer"]["class_path"].endswith("LearnedScorer"),
            *(specs[f"learned-{name}"]["allocator"]["init_args"].get(key) for key in switches),
        )
        for name in ("layer", "head", "both", "conditioned", "token", "all")
    }
    assert parts == {
        "layer": (False, False, True, False),
        "head": (False, True, False, False),
        "both": (False, True, True, False),
        "conditioned": (False, True, True, True),
        "token": (True, None, None, None),
        "all": (True, True, True, True),
    }
    assert specs["learned-hidden"] == specs["learned-scores"] == specs["learned-all"]
