"""Mathematics with a chain of thought: results, where an answer ends, and what is held while it is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import eval
from support.models import Loaded

from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.held_bytes import HeldBytes
from learnkv.evaluation.tasks.reasoning import MathSample, Written
from learnkv.evaluation.written_answers import written_answers
from learnkv.inference.generate import continuation
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy

GSM8K = {"question": "A hen lays 3 eggs. And 4?", "answer": "3 + 4 = <<3+4=7>>7 eggs.\nMore: 1,000.\n#### 1,007"}
MATH = {"problem": "Half of one?", "answer": "\\frac{1}{2}", "solution": "It is $\\boxed{\\frac{1}{2}}$."}


def sample(answer: str) -> MathSample:
    return MathSample("p", "q", "Solution:", [answer], "math500", 64)


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("\\frac{1}{2}", "So it is \\boxed{0.5}.", 1),
        ("\\frac{1}{2}", "So it is $\\frac{2}{4}$", 1),
        ("18", "She makes 9 * 2 = 18 dollars.", 1),
        ("18", "\\boxed{18}\n\nProblem: another. \\boxed{7}", 1),
        ("7", "\\boxed{18}\n\nProblem: another. \\boxed{7}", 0),
        ("18", "<think>\\boxed{7} no</think> \\boxed{18}", 1),
        ("18", "<think>\\boxed{18}", 0),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\boxed{(3, \\pi/2)}", 1),
        ("18", "", 0),
    ],
)
def test_results(answer: str, prediction: str, score: float) -> None:
    assert sample(answer).score(prediction) == score


@pytest.mark.parametrize(
    ("prediction", "complete"),
    [
        ("\\boxed{18}", True),
        ("\\boxed{\\frac{1}{2}", False),
        ("\\boxed{\\frac{1}{2}}", True),
        ("it is 18", False),
        ("<think>\\boxed{18}", False),
        ("<think>\\boxed{18}</think>", False),
    ],
)
def test_an_answer_ends_with_its_first_complete_box(prediction: str, complete: bool) -> None:
    assert sample("18").complete(prediction) == complete


def load(loaded: Loaded, tmp_path: Path, names: str, row: dict[str, Any], **keys: Any) -> list[Prompt]:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    suite = SuiteKeys(**{names: str(tmp_path / "rows.jsonl")}, max_new_tokens=64)
    config = EvalConfig(tasks=("reasoning",), suite=suite, lengths=(384,), **keys)
    return [prompt for family in tasks.load(config, loaded[1], 512) for prompt in family.prompts]


def test_rows_of_gsm8k_and_math(loaded: Loaded, tmp_path: Path) -> None:
    (prompt,) = load(loaded, tmp_path, "gsm8k", GSM8K)
    assert prompt.sample is not None
    assert prompt.sample.answers == ["1007"]
    assert prompt.sample.gold == "3 + 4 = 7 eggs.\nMore: 1,000.\n\\boxed{1007}"
    assert prompt.sample.context == "Problem: A hen lays 3 eggs. And 4?\n\n"
    (prompt,) = load(loaded, tmp_path, "math500", MATH)
    assert prompt.sample is not None
    assert (prompt.sample.answers, prompt.sample.gold) == (["\\frac{1}{2}"], MATH["solution"])
    (prompt,) = load(loaded, tmp_path, "aime", {"Problem": "Which?", "Answer": 204})
    assert prompt.sample is not None
    assert (prompt.sample.answers, prompt.sample.gold) == (["204"], "\\boxed{204}")


@pytest.mark.parametrize(
    ("task", "row", "line"),
    [
        ("gsm8k", {**GSM8K, "answer": "7"}, "line 1, column answer: expected #### and the result at the end, got '7'"),
        ("math500", {"problem": "a"}, "line 1: expected the columns problem, answer; answer missing"),
        ("math500", {**MATH, "problem": 5}, "line 1, column problem: expected text, got 5"),
    ],
)
def test_malformed_rows(loaded: Loaded, tmp_path: Path, task: str, row: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        load(loaded, tmp_path, task, row)


def test_online_eviction_holds_its_budget_and_what_it_adds_between(loaded: Loaded) -> None:
    model, policy = loaded[0], load_policy("h2o_decode")
    ids = torch.randint(2, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    cache = policy.compress(prefill(model, ids, policies=[policy]), budget=16)
    held = HeldBytes(cache)
    interval = policy.evict_interval
    for _ in range(6):
        continuation(model, ids[:, :8], cache)
        held.update(cache, [0, 1])
    token = cache.full_nbytes / sum(cache.lengths)
    assert all(16 * token < most < (16 + interval + 16) * token * 1.2 for most in held.most)


def test_bytes_of_long_answers_are_those_held(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps({**GSM8K, "question": f"{n} hens? " * 30}) + "\n" for n in range(2)))
    words = [f"model={model_folder}", "ckpt=h2o_decode", "tasks=gsm8k", f"suite.gsm8k={file}", "lengths=384"]
    assert eval([*words, "suite.max_new_tokens=48", "budget=24", f"output={tmp_path / 'run'}"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for record in records:
        assert record["bytes"] == record["held_bytes"] > 0
        assert record["bytes"] <= record["bytes_full"] * (1.0 if record["policy"] == "full" else 0.9)
    text = (tmp_path / "run" / "results.md").read_text()
    assert "| policy | budget | accuracy | bytes held | of a full cache | tokens generated |" in text
    assert next(written_answers(records)) == "## gsm8k, query-agnostic, 384 tokens"


def test_what_measures_long_answers(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GSM8K))
    suite = SuiteKeys(gsm8k=str(tmp_path / "rows.jsonl"), max_new_tokens=64)
    for score, family in (("generated", Written), ("forced", tasks.Forced)):
        config = EvalConfig(tasks=("gsm8k",), suite=suite, lengths=(384,), score=score)
        assert [type(made) for made in tasks.load(config, loaded[1], 512)] == [family]
    with pytest.raises(UserError, match=r"tasks=reasoning: expected one or more of suite\.gsm8k=PATH"):
        tasks.load(EvalConfig(tasks=("reasoning",), lengths=(384,)), loaded[1], 512)
