"""Accepted lengths of lossless decoding in tables, and nowhere in pictures."""

import json
import re
from pathlib import Path

import pytest
from support.commands import eval
from support.evaluation import policies, question_prompts, text_prompts
from support.models import Loaded

from learnkv.errors import UserError
from learnkv.evaluation import pictures, report, runner
from learnkv.evaluation.accepted import check_drafts
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import Record, rows_of
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.text import Text

BUDGETS = [Budget(keep=1), Budget(keep=0.3)]


def compared(loaded: Loaded, path: Path, draft_tokens: int, batch_size: int = 3) -> list[Record]:
    families = [Answers(question_prompts(loaded[1], 3), loaded[1])]
    jobs = jobs_of(loaded[0], policies("random", "h2o_decode"), BUDGETS, draft_tokens)
    path.mkdir(exist_ok=True)
    store = Store(path / "samples.jsonl")
    runner.run(loaded[0], families, jobs, store, Packing(batch_size))
    return runner.finished(families, jobs, store)


def test_accepted_lengths_are_a_column_and_change_nothing_else(loaded: Loaded, tmp_path: Path) -> None:
    records = compared(loaded, tmp_path, 4)
    plain = compared(loaded, tmp_path, 0)
    for record, other in zip(records, plain, strict=True):
        same = {key: other[key] for key in ("policy", "keep", "score", "answer", "bytes", "spent")}
        assert same == {key: record[key] for key in same}
        assert "accepted" not in other
    rows = rows_of(records)
    by_name = {(row["policy"], row["keep"]): row for row in rows}
    assert by_name["full", 1]["accepted"] is None
    assert [row["draft_tokens"] for row in rows] == [None, *[4] * 4]
    for name in ("random", "h2o_decode"):
        every = [record for record in records if (record["policy"], record["keep"]) == (name, 1)]
        assert all(record["accepted"] <= 4 * record["rounds"] for record in every)
        # Six tokens: one of the question's logits, then a round of four and their successor.
        assert by_name[name, 1]["accepted"] == 4
    few = by_name["random", 0.3]["accepted"]
    alone = [r for r in records if (r["policy"], r["keep"]) == ("random", 0.3)]
    assert few == sum(r["accepted"] for r in alone) / sum(r["rounds"] for r in alone) < 4
    text = report.markdown("tiny", rows, records, {})
    assert f"| random | 4.00 of 4 | {few:.2f} of 4 |" in text
    assert "## Lossless decoding" not in report.markdown("tiny", rows_of(plain), plain, {})


def test_rows_of_a_batch_are_drafted_as_alone(loaded: Loaded, tmp_path: Path) -> None:
    together, alone = (compared(loaded, tmp_path / str(size), 4, size) for size in (3, 1))
    for key in ("accepted", "rounds"):
        assert [record.get(key) for record in together] == [record.get(key) for record in alone]


def test_pictures_do_not_show_them(loaded: Loaded, tmp_path: Path) -> None:
    rows = rows_of(compared(loaded, tmp_path, 4))

    def lines(rows: list[Record]) -> list[list[list[float]]]:
        return [line.get_xydata().tolist() for axis in pictures.pareto(rows).axes for line in axis.get_lines()]

    assert lines(rows) == lines([{**row, "accepted": None, "draft_tokens": None} for row in rows])


def test_only_answers_are_drafted(loaded: Loaded) -> None:
    text = Text(text_prompts(2))
    with pytest.raises(UserError, match="draft_tokens=4: drafts answers, expected a task with questions"):
        check_drafts(4, [text])
    check_drafts(0, [text])
    check_drafts(4, [text, Answers(question_prompts(loaded[1], 1), loaded[1])])


def test_the_key_of_the_command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model={model_folder}", "tasks=niah_single_1", "lengths=384", "samples=1", "keep=0.2", "baselines=random"]
    assert eval([*words, "draft_tokens=3", f"output={tmp_path / 'out'}"]) == 0
    assert re.search(r"\| random \| \d\.\d\d of 3 \|", capsys.readouterr().out)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert 0 <= rows[1]["accepted"] <= 3
    assert eval([*words, "draft_tokens=-1", f"output={tmp_path / 'other'}"]) == 2
    assert capsys.readouterr().err == "error: draft_tokens=-1: expected a number of tokens, at least 0\n"
