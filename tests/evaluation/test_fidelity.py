"""The fidelity report: nothing changes where everything is kept, every measure by hand, and limits that end a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import eval
from support.evaluation import policies
from support.models import Loaded

from learnkv.errors import RunError, UserError
from learnkv.evaluation import runner, tasks
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.fidelity import Gate, fidelity_report
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import FIDELITY, rows_of
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.fidelity import CUE, NEW_TOKENS, QUOTE, _agreement, _common, _passage

WORDS = ["--ckpt", "snapkv", "tasks=fidelity", "lengths=128", "samples=2", "keep=1.0,0.5,0.1", "dtype=float32"]


@pytest.fixture(scope="module")
def records(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("fidelity")
    (family,) = tasks.load(EvalConfig(tasks=("fidelity",), lengths=(128,), samples=3), loaded[1], 512)
    budgets = [Budget(keep=1.0), Budget(keep=0.5), Budget(keep=0.1)]
    jobs, store = jobs_of(loaded[0], policies("snapkv"), budgets), Store(folder / "samples.jsonl")
    runner.run(loaded[0], [family], jobs, store, Packing())
    return runner.finished([family], jobs, store)


def test_nothing_changes_where_everything_is_kept(records: list[Any]) -> None:
    for record in (one for one in records if one["keep"] == 1):
        full = next(one for one in records if one["policy"] == "full" and one["index"] == record["index"])
        assert record["kl"] < 1e-9
        assert [record[key] for key in FIDELITY] == [0, 100, 0, full["quote"]]
        assert record["answer"] == full["answer"]


def test_less_is_less_faithful(records: list[Any]) -> None:
    whole, half, tenth = [row for row in rows_of(records) if row["policy"] == "snapkv"]
    assert whole["kl"] < half["kl"] < tenth["kl"]
    assert whole["flips"] <= half["flips"] < tenth["flips"]
    assert whole["agreement"] > half["agreement"]


def test_measures_are_those_of_plain_generation(loaded: Loaded, records: list[Any]) -> None:
    model, tokenizer = loaded
    (family,) = tasks.load(EvalConfig(tasks=("fidelity",), lengths=(128,), samples=3), tokenizer, 512)
    for prompt in family.prompts:
        record = next(one for one in records if one["policy"] == "full" and one["index"] == prompt.index)
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
        start = torch.tensor([prompt.prefill_ids + prompt.suffix_ids[:1]])
        new = model.generate(start, max_new_tokens=min(NEW_TOKENS, len(prompt.suffix_ids)), **settings)[
            0, start.shape[1] :
        ]
        assert record["answer"] == tokenizer.decode(new)
        passage = _passage(prompt)
        read, end = prompt.prefill_ids, tokenizer("\n\n", add_special_tokens=False).input_ids
        begins = [begin for begin in range(len(read)) if read[begin : begin + CUE] == passage[:CUE]]
        assert [read[begin : begin + CUE + QUOTE] for begin in begins] == [passage]
        cue = torch.tensor([[*read, *end, *passage[:CUE]]])
        quoted = model.generate(cue, max_new_tokens=QUOTE, **settings)[0, cue.shape[1] :].tolist()
        right = 0
        while right < len(quoted) and quoted[right] == passage[CUE + right]:
            right += 1
        assert record["quote"] == 100 * right / QUOTE


def test_measures_of_token_lists() -> None:
    assert _agreement([1, 2, 3], [1, 5, 3]) == pytest.approx(2 / 3)
    assert _agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert (_common([1, 2, 3], [1, 2, 4]), _common([1, 2], [1, 2, 4]), _common([2], [1])) == (2, 2, 0)


def test_a_command_writes_the_ladder_and_keeps_limits(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, f"model={model_folder}", f"output={tmp_path / 'run'}"]
    assert eval([*words, "gate.keep=1", "gate.kl=1e-6", "gate.flips=0", "gate.agreement=100", "gate.quote=0"]) == 0
    table = (tmp_path / "run" / "results.md").read_text()
    assert "## Fidelity, 128 tokens" in table
    assert "| snapkv | keep 1 | 0.0000 | 0.0 | 100.0 | 0.0 |" in table
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [(row["policy"], row["keep"]) for row in rows] == [
        ("full", 1),
        ("snapkv", 1),
        ("snapkv", 0.5),
        ("snapkv", 0.1),
    ]
    tenth = rows[-1]
    capsys.readouterr()
    assert eval([*words, "gate.keep=0.1", f"gate.kl={tenth['kl'] * 0.9}", "gate.agreement=0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: fidelity: snapkv keep 0.1: KL ")
    assert "keep 0.5" not in error
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == rows
    assert eval([*words, "gate.keep=0.1", f"gate.kl={tenth['kl'] * 1.1}"]) == 0


ROW = {"task": "fidelity", "policy": "p", "keep": 0.5, "budget": None, "bytes_budget": None, "spent": 0.4995, "n": 2}
GOOD = {"kl": 0.01, "flips": 2.0, "agreement": 90.0, "length_drift": 3.0, "quote": 70.0, "quote_full": 75.0}


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        ({"kl": 0.01, "flips": 2.0, "agreement": 90.0, "length_drift": 3.0, "quote": 5.0}, None),
        ({"kl": 0.009}, "p keep 0.5: KL 0.01, expected at most 0.009"),
        ({"flips": 1.0}, "p keep 0.5: flips 2, expected at most 1"),
        ({"agreement": 91.0}, "p keep 0.5: token agreement 90, expected at least 91"),
        ({"length_drift": 2.0}, "p keep 0.5: length drift 3, expected at most 2"),
        ({"quote": 4.0}, "p keep 0.5: loss of quotes 5, expected at most 4"),
        ({"quote": 5.0, "keep": 0.6}, "gate.keep=0.6: no policy keeps as much"),
    ],
)
def test_limits(limits: dict[str, float], line: str | None) -> None:
    rows = [{**ROW, **GOOD}, {**ROW, **GOOD, "policy": "full"}, {**ROW, "task": "text"}]
    if line is None:
        Gate(**limits).check(rows)
        return
    with pytest.raises(RunError, match=line):
        Gate(**limits).check(rows)
    with pytest.raises(RunError, match=r"at most|at least|nothing was checked"):
        Gate(**limits).check([{**rows[0], **dict.fromkeys(GOOD, float("nan"))}])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Gate(), "gate: expected a limit"),
        (lambda: Gate(keep=0.0, kl=1.0), "gate.keep=0: expected a fraction"),
        (lambda: EvalConfig(gate=Gate(kl=1.0)), "gate: expected tasks=fidelity to check, got tasks=ruler"),
    ],
)
def test_limits_that_cannot_be_checked(make: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        make()


def test_a_short_text_is_refused_and_a_file_is_read(loaded: Loaded, text_file: Path) -> None:
    with pytest.raises(UserError, match="lengths=64: expected at least 96 tokens for fidelity"):
        tasks.load(EvalConfig(tasks=("fidelity",), lengths=(64,)), loaded[1], 512)
    config = EvalConfig(tasks=("fidelity", "text"), text=str(text_file), lengths=(128,), samples=2)
    families = tasks.load(config, loaded[1], 512)
    assert [[prompt.task for prompt in family.prompts] for family in families] == [["text"] * 2, ["fidelity"] * 2]
    assert families[0].prompts[0].prefill_ids == families[1].prompts[0].prefill_ids
    assert list(fidelity_report([])) == []
