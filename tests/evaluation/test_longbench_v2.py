"""LongBench v2: letters that replies give, and the likelihood of choices against transformers' own output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import eval
from support.models import Loaded

from learnkv.errors import RunError, UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.results import kind_of
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.evaluation.tasks.choices import Choices, ChoiceSample
from learnkv.evaluation.tasks.longbench_v2 import LetterSample
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy

ROW = {
    "question": "Which colour?",
    **{f"choice_{letter}": colour for letter, colour in zip("ABCD", ("red", "blue", "green", "grey"), strict=True)},
    "answer": "C",
    "context": "The sea is green. " * 8,
    "difficulty": "easy",
    "length": "short",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [ROW, {**ROW, "difficulty": "hard"}, {**ROW, "answer": "A", "length": "long"}]
    (tmp_path / "v2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "v2.jsonl"


def load(loaded: Loaded, file: Path, names: str = "longbench_v2", **keys: Any) -> list[tasks.Family]:
    suite = SuiteKeys(longbench_v2=str(file), max_new_tokens=12)
    config = EvalConfig(tasks=tuple(names.split(",")), suite=suite, lengths=(384,), **keys)
    return tasks.load(config, loaded[1], 512)


def letter(cue: str = "The correct answer is") -> LetterSample:
    return LetterSample("c", "q", cue, ["(C)"], "t", 8, choices=("(A)", "(B)", "(C)", "(D)"))


@pytest.mark.parametrize(
    ("cue", "reply", "score"),
    [
        ("The correct answer is", " (C) green", 1),
        ("The correct answer is", " **(C)**", 1),
        ("The correct answer is", " C", 1),
        ("The correct answer is", " (B). The correct answer is (C)", 0),
        ("The correct answer is", " B. The correct answer is (C)", 1),
        ("The correct answer is", " green", 0),
        ("", "The correct answer is (C).", 1),
        ("", "(C)", 0),
    ],
)
def test_the_letter_of_a_reply(cue: str, reply: str, score: float) -> None:
    assert letter(cue).score(reply) == score


def test_a_reply_is_complete_with_a_letter_in_brackets() -> None:
    assert letter().complete(" (B)")
    assert not letter().complete(" B")  # the original prefers a later one in brackets
    assert not letter().complete(" (")


def test_parts_are_the_rows_that_they_name(loaded: Loaded, file: Path) -> None:
    (family,) = load(loaded, file, "longbench_v2,longbench_v2_hard,longbench_v2_long")
    rows: dict[str, list[int]] = {}
    for prompt in family.prompts:
        rows.setdefault(prompt.task, []).append(prompt.index)
    assert {task: sorted(indices) for task, indices in rows.items()} == {
        "longbench_v2": [0, 1, 2],
        "longbench_v2_hard": [1],
        "longbench_v2_long": [2],
    }
    with pytest.raises(UserError, match=r"tasks=longbench_v2_medium: .* has none of these rows"):
        load(loaded, file, "longbench_v2_medium")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"answer": "E"}, "line 1, column answer: expected one of A, B, C, D, got E"),
        ({"choice_B": None}, "line 1, column choice_B: expected text, got a blank cell"),
        ({"context": 5}, "line 1, column context: expected text, got 5"),
    ],
)
def test_malformed_rows(loaded: Loaded, tmp_path: Path, change: dict[str, Any], line: str) -> None:
    (tmp_path / "v2.jsonl").write_text(json.dumps({**ROW, **change}))
    with pytest.raises(UserError, match=line):
        load(loaded, tmp_path / "v2.jsonl")


def plain_log_likelihood(loaded: Loaded, prompt: Prompt, choice: list[int]) -> float:
    """Of the model without us."""
    ids = [*prompt.prefill_ids, *prompt.suffix_ids, *choice]
    with torch.no_grad():
        logits = loaded[0](torch.tensor([ids])).logits[0, -len(choice) - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, torch.tensor(choice)[:, None]).sum())


def test_likelihoods_of_choices_are_those_of_the_plain_model(loaded: Loaded, file: Path) -> None:
    (family,) = load(loaded, file, score="forced")
    assert isinstance(family, Choices)
    ids, mask = pad([prompt.prefill_ids for prompt in family.prompts], "left", loaded[0].device)
    cache = prefill(loaded[0], ids, mask, policies=[load_policy("knorm")])
    records, full = family.measure(loaded[0], family.prompts, cache.fork())
    for prompt, record in zip(family.prompts, records, strict=True):
        choices = family.choice_ids(prompt)
        assert [loaded[1].decode(choice) for choice in choices] == [" (A)", " (B)", " (C)", " (D)"]
        plain = [plain_log_likelihood(loaded, prompt, choice) for choice in choices]
        assert record["log_likelihoods"] == pytest.approx(plain, abs=1e-3)
        assert isinstance(prompt.sample, ChoiceSample)
        assert record["answer"] == prompt.sample.choices[plain.index(max(plain))]
        assert record["score"] == 100 * (record["answer"] == prompt.sample.answers[0])
        assert record["kl"] == 0
    some, _ = family.measure(loaded[0], family.prompts, load_policy("knorm").compress(cache.fork(), keep=0.2), full)
    assert all(record["kl"] > 0 for record in some)


def test_prompts_with_fewer_choices_are_measured_with_others(loaded: Loaded, file: Path) -> None:
    samples = [
        LetterSample("The sea is red.", " Which", " is", ["red"], "t", 4, choices=choices)
        for choices in (("red", "blue"), ("blue", "grey", "red"))
    ]
    family = Choices(list(tasks.answers.tokenised(enumerate(samples), "query_agnostic", 64, loaded[1])), loaded[1])
    ids, mask = pad([prompt.prefill_ids for prompt in family.prompts], "left", loaded[0].device)
    records, _ = family.measure(loaded[0], family.prompts, prefill(loaded[0], ids, mask))
    assert [len(record["log_likelihoods"]) for record in records] == [2, 3]
    for prompt, record in zip(family.prompts, records, strict=True):
        plain = [plain_log_likelihood(loaded, prompt, choice) for choice in family.choice_ids(prompt)]
        assert record["log_likelihoods"] == pytest.approx(plain, abs=1e-3)


def test_nan_stops_the_run(loaded: Loaded, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (family,) = load(loaded, file, score="forced")
    nan = torch.full((3, 512, 8), float("nan"))
    monkeypatch.setattr("learnkv.evaluation.tasks.choices.read", lambda *given, **more: nan)
    with pytest.raises(RunError, match="NaN"):
        family.measure(loaded[0], family.prompts, prefill(loaded[0], torch.ones(3, 4, dtype=torch.long)), None)


def test_choices_have_tables_and_pictures_of_their_own(model_folder: Path, file: Path, tmp_path: Path) -> None:
    words = [f"model={model_folder}", "ckpt=knorm", "tasks=longbench_v2", f"suite.longbench_v2={file}", "keep=0.5"]
    more = ["lengths=384", "suite.max_new_tokens=8", f"output={tmp_path / 'run'}"]
    assert eval([*words, *more, "score=forced"]) == 0
    assert eval([*words, *more]) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert sorted((kind_of(row), row["policy"]) for row in rows) == [
        (kind, policy) for kind in ("choices", "generated") for policy in ("full", "knorm")
    ]
    text = (tmp_path / "run" / "results.md").read_text()
    assert "the choices are read, not generated, 384 tokens" in text
    assert "% of prompts whose right choice is the most likely" in text
    assert (tmp_path / "run" / "pareto.png").stat().st_size > 1000
