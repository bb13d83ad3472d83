"""Which prompts `tasks=` means, and the one line for what it cannot mean."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.models import Loaded

from learnkv.data.ruler import NEEDLES, TASKS
from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks import ruler
from learnkv.evaluation.tasks.base import Family, Prompt

LAYOUT = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")


def load(loaded: Loaded, context: int = 512, **keys: Any) -> list[Family]:
    settings = {"tasks": ("niah_single_1",), "lengths": (384,), "samples": 2, **keys}
    return tasks.load(EvalConfig(**settings), loaded[1], context)


def prompts(families: list[Family]) -> list[Prompt]:
    return [prompt for family in families for prompt in family.prompts]


def table(rows: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "context": f"Page {i}. The code is {i}{i}{i}.",
            "question": "\nWhat is the code?",
            "answer_prefix": " It is",
            "answer": [f"{i}{i}{i}", "or this"],
            "task": "qa_1" if i % 2 else "niah_single_1",
            "max_new_tokens": 8,
        }
        for i in range(rows)
    ]


def test_groups_are_written_out() -> None:
    assert ruler.tasks_named(["niah"], ()) == list(NEEDLES)
    assert ruler.tasks_named(["ruler"], ("qa.json",)) == list(TASKS)
    assert ruler.tasks_named(["ruler"], ()) == [task for task in TASKS if not task.startswith("qa")]
    assert ruler.tasks_named(["vt", "niah", "vt", "qa_1"], ()) == ["vt", *NEEDLES, "qa_1"]


def test_generated_prompts_fill_the_length_in_both_settings(
    loaded: Loaded,
) -> None:
    families = load(loaded, tasks=("niah_single_1", "niah_single_2"), setting=("query_agnostic", "query_aware"))
    assert [{p.setting for p in family.prompts} for family in families] == [{"query_agnostic"}, {"query_aware"}]
    found = prompts(families)
    assert len(found) == 2 * 2 * 2
    assert all(320 < prompt.room <= 384 for prompt in found)
    by_text: dict[str, Any] = {}
    for prompt in found:
        by_text.setdefault((prompt.task, prompt.index), set()).add(tuple(prompt.prefill_ids + prompt.suffix_ids))
    assert all(len(same) == 1 for same in by_text.values())
    assert {(p.task, p.haystack) for p in found} == {
        ("niah_single_1", "noise"),
        ("niah_single_2", "essay:pydoc_data.topics"),
    }


def test_more_samples_extend_fewer(loaded: Loaded) -> None:
    few, many = (prompts(load(loaded, samples=n)) for n in (2, 4))
    assert {p.digest for p in few} < {p.digest for p in many}
    assert len(many) == 4


def test_a_seed_draws_other_prompts_and_a_chat_template_leaves_room(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (prompts(load(loaded, seed=seed)) for seed in (1, 2))
    assert not {p.digest for p in here} & {p.digest for p in there}
    template = "{{ bos_token }}" + "system: be brief. " * 4 + "{{ messages[0]['content'] }} reply:"
    monkeypatch.setattr(loaded[1], "chat_template", template)
    assert all(320 < p.room <= 384 for p in prompts(load(loaded)))


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_table_is_read_from_any_file(loaded: Loaded, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"mine.{suffix}"
    rows = datasets.Dataset.from_list(table())
    if suffix == "csv":
        rows = rows.map(lambda row: {"answer": str(row["answer"])}, remove_columns="answer")
    {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](file)
    found = prompts(load(loaded, tasks=(str(file),), samples=10, lengths=(64,)))
    assert len(found) == 6
    assert all(prompt.sample.answers == [str(prompt.index) * 3, "or this"] for prompt in found)
    assert {(prompt.task, prompt.sample.metric) for prompt in found} == {("qa_1", "part"), ("niah_single_1", "all")}
    assert {(prompt.length, prompt.sample.max_new_tokens) for prompt in found} == {(64, 8)}
    assert all(loaded[1].decode(prompt.suffix_ids) == "\nWhat is the code? It is" for prompt in found)


def test_a_table_gives_so_many_of_every_task_and_more_extend_fewer(loaded: Loaded, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in table(20)))
    few, many = (prompts(load(loaded, tasks=(str(file),), samples=n)) for n in (2, 5))
    assert sorted(prompt.task for prompt in few) == ["niah_single_1"] * 2 + ["qa_1"] * 2
    assert {p.index for p in few} < {p.index for p in many}
    assert len(many) == 10


def test_text_is_cut_before_a_last_quarter(loaded: Loaded, text_file: Path) -> None:
    found = prompts(load(loaded, tasks=("text",), text=str(text_file), lengths=(64,), samples=3))
    assert [(len(p.prefill_ids), len(p.suffix_ids)) for p in found] == [
        (47, 17)
    ] * 3  # 16 tokens are judged, and one is read first
    assert {(p.setting, p.haystack, p.length) for p in found} == {("query_agnostic", "held_out.txt", 64)}
    again = prompts(load(loaded, tasks=("text",), text=str(text_file), lengths=(64,), samples=5))
    assert {p.digest for p in found} < {p.digest for p in again}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"tasks": ("niah_singel_1",)},
            "tasks=niah_singel_1: expected a table or one of: .*did you mean niah_single_1",
        ),
        ({"lengths": (1024,)}, "lengths=1024: expected at most 512, the model's context"),
        ({"tasks": ("missing.jsonl",)}, "tasks=missing.jsonl: expected a hub id or a file ending in"),
        ({"tasks": ("qa_1",)}, "qa_1: needs a file in squad's layout, qa=FILE"),
        ({"tasks": ("text",)}, "tasks=text: expected text=FILE"),
        ({"tasks": ("text",), "text": "missing.txt"}, "text missing.txt: no such file"),
        ({"tasks": ("text",), "text": "x.txt", "lengths": (4,)}, "lengths=4: expected at least 8"),
        ({"lengths": (40,)}, "length is 40"),
        ({"tasks": ("niah_single_2",), "haystack": "missing.txt"}, "missing.txt"),
        (
            {"tasks": ("niah_single_1",), "haystack": "x.txt"},
            "haystack=x.txt: read by niah_single_2, .*=niah_single_1$",
        ),
    ],
)
def test_what_cannot_be_is_one_line(loaded: Loaded, keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        load(loaded, **keys)
    assert "\n" not in str(caught.value)


def test_a_table_without_its_columns_or_with_several_lengths(loaded: Loaded, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({key: "x" for key in LAYOUT if key != "answer_prefix"}) + "\n")
    with pytest.raises(UserError, match=r"expected the columns .*; answer_prefix missing"):
        load(loaded, tasks=(str(file),))
    with pytest.raises(UserError, match=r"lengths=64,128: a table has one length"):
        load(loaded, tasks=(str(file),), lengths=(64, 128))


def test_a_prompt_longer_than_the_context_is_named(loaded: Loaded, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({**table(1)[0], "context": "word " * 600}) + "\n")
    with pytest.raises(UserError, match=r"niah_single_1: prompt 0 has \d+ tokens .* the model's context is 512"):
        load(loaded, tasks=(str(file),))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"keep": (0.5, 1.5)}, "keep=1.5: expected a fraction"),
        ({"keep": (0.0,)}, "keep=0: expected a fraction"),
        ({"keep": (float("nan"),)}, "keep=nan: expected a fraction"),
        ({"budget": (0,)}, "budget=0: expected at least 1"),
        ({"samples": 0}, "samples=0: expected at least 1"),
        ({"lengths": (64, -1)}, "lengths=-1: expected at least 1"),
        ({"setting": ()}, "setting=: expected at least one"),
    ],
)
def test_values_out_of_range(keys: dict[str, int | tuple[float, ...]], line: str) -> None:
    with pytest.raises(UserError, match=line):
        EvalConfig(**keys)


def test_budgets_are_asked_largest_first() -> None:
    assert [str(b) for b in EvalConfig(keep=(0.1, 0.5, 0.1)).budgets] == ["keep 0.5", "keep 0.1"]
    assert [str(b) for b in EvalConfig(budget=(64, 256)).budgets] == ["budget 256", "budget 64"]
    assert [str(b) for b in EvalConfig(keep=(0.5,), budget=(64,)).budgets] == ["keep 0.5", "budget 64"]
    assert [b.keep for b in EvalConfig().budgets] == [0.5, 0.25, 0.1, 0.05]
    asked = EvalConfig(keep=(0.5,), budget=(64,)).budgets
    assert [b.fraction(256, full=1) for b in asked] == [0.5, 0.25]
    assert asked[1].fraction(32, full=1) == 1
