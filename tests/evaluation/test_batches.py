"""Batches packed by tokens, and prompts that do not fit in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import eval
from support.evaluation import KEEPS, policies, question_prompts, text_prompts
from support.models import Loaded

from learnkv.data.sample import Sample
from learnkv.evaluation import measured_jobs, runner
from learnkv.evaluation.batches import Packing, is_out_of_memory
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.policy.policy import Policy


def prompts_of(*lengths: int) -> list[Prompt]:
    """Prompts with so many tokens to read, a suffix of 3 and an answer of up to 5."""
    sample = Sample("", "", "", ["x"], "vt", 5)
    return [Prompt("vt", 64, "query_agnostic", i, [1] * n, [1] * 3, sample) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("packing", "sizes"),
    [
        (Packing(rows=4), [4, 2]),
        (Packing(tokens=54), [3, 1, 1, 1]),  # of 18, 18, 18, 28, 48 and 108 tokens
        (Packing(tokens=96), [3, 2, 1]),
        (Packing(2, 96), [2, 2, 1, 1]),
        (Packing(tokens=1), [1] * 6),
        (Packing(), [6]),
    ],
)
def test_prompts_are_packed_by_their_tokens(packing: Packing, sizes: list[int]) -> None:
    prompts = prompts_of(10, 10, 10, 20, 40, 100)
    batches = list(packing.batches(prompts))
    assert list(map(len, batches)) == sizes
    assert [prompt for batch in batches for prompt in batch] == prompts


@pytest.mark.parametrize(
    ("keys", "packing"),
    [
        ((None, None), Packing(None, 16384)),
        ((8, None), Packing(8)),
        ((None, 99), Packing(None, 99)),
        ((8, 99), Packing(8, 99)),
    ],
)
def test_keys_of_the_command_line(keys: tuple[Any, Any], packing: Packing) -> None:
    assert Packing.of_keys(*keys) == packing


def run(loaded: Loaded, family: Any, path: Path, packing: Packing, names: tuple[str, ...] = ("snapkv", "quest")) -> Any:
    path.mkdir(exist_ok=True)
    jobs, store = jobs_of(loaded[0], policies(*names), KEEPS), Store(path / "samples.jsonl")
    skipped = runner.run(loaded[0], [family], jobs, store, packing)
    return runner.finished([family], jobs, store), skipped


def test_results_do_not_depend_on_the_packing(loaded: Loaded, tmp_path: Path) -> None:
    prompts = question_prompts(loaded[1], 5)
    runs = [
        run(loaded, Answers(prompts, loaded[1]), tmp_path / str(number), packing)[0]
        for number, packing in enumerate((Packing(1), Packing(tokens=150), Packing()))
    ]
    assert len({record["bytes"] for record in runs[0]}) > 10
    for records in zip(*runs, strict=True):
        for key in ("fingerprint", "score", "answer", "tokens", "spent", "read", "bytes_full"):
            assert len({record[key] for record in records}) == 1
        if records[0]["policy"] != "quest":  # bounds of pages are padded to the longest prompt of a batch
            assert len({record["bytes"] for record in records}) == 1


def short_of_memory(monkeypatch: pytest.MonkeyPatch, slots: int) -> list[tuple[int, ...]]:
    """Let a prefill of more than `slots` slots fail; shapes of the prefills that were tried."""
    plain, shapes = measured_jobs.prefill, []

    def limited(model: Any, ids: torch.Tensor, *given: Any, **options: Any) -> Any:
        shapes.append(tuple(ids.shape))
        if ids.numel() > slots:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(model, ids, *given, **options)

    monkeypatch.setattr(measured_jobs, "prefill", limited)
    return shapes


def test_a_batch_that_does_not_fit_is_halved(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(loaded, Text(text_prompts(5)), tmp_path / "whole", Packing(), ("snapkv",))
    shapes = short_of_memory(monkeypatch, 2 * 35)
    records, skipped = run(loaded, Text(text_prompts(5)), tmp_path / "halves", Packing(), ("snapkv",))
    assert [rows for rows, _ in shapes] == [5, 2, 3, 1, 2]
    assert skipped == []
    assert [record["fingerprint"] for record in records] == [record["fingerprint"] for record in expected]
    for record, other in zip(records, expected, strict=True):
        assert record["kl"] == pytest.approx(other["kl"], abs=1e-5)


def test_a_prompt_that_does_not_fit_is_named_and_the_others_go_on(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = [*text_prompts(2), *text_prompts(3, 64)[2:]]
    short_of_memory(monkeypatch, 2 * 35 - 1)
    records, skipped = run(loaded, Text(prompts), tmp_path, Packing(), ("snapkv",))
    assert {record["index"] for record in records} == {0, 1, 2}
    short_of_memory(monkeypatch, 40)
    records, skipped = run(loaded, Text(prompts), tmp_path / "less", Packing(), ("snapkv",))
    line = "text, query_agnostic, prompt 2 of 51 tokens did not fit in memory (prefill) and is in no policy's row"
    assert skipped == [line]
    assert f"warning: {line}" in capfd.readouterr().err
    assert {record["index"] for record in records} == {0, 1}


def test_a_policy_that_needs_too_much_is_named(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Policy.compress

    def compress(self: Policy, cache: Any, **budget: Any) -> Any:
        if budget["keep"] == 0.25 and max(cache.prompt_lengths) > 40:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 bytes.")
        return plain(self, cache, **budget)

    monkeypatch.setattr(Policy, "compress", compress)
    prompts = [*text_prompts(2), *text_prompts(3, 64)[2:]]
    records, skipped = run(loaded, Text(prompts), tmp_path, Packing(1), ("snapkv",))
    assert {record["index"] for record in records} == {0, 1}
    assert len(records) == 2 * 4
    assert [line.partition(" did not")[2] for line in skipped] == [
        " fit in memory (snapkv keep 0.25) and is in no policy's row"
    ]
    monkeypatch.setattr(Policy, "compress", plain)  # with enough memory the same command measures what is missing
    records, skipped = run(loaded, Text(prompts), tmp_path, Packing(1), ("snapkv",))
    assert (len(records), skipped) == (3 * 4, [])


def test_other_errors_are_not_taken_for_it(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(measured_jobs, "prefill", fails)
    with pytest.raises(RuntimeError, match="must match"):
        run(loaded, Text(text_prompts(2)), tmp_path, Packing())
    assert not is_out_of_memory(ValueError("not enough memory: you tried to allocate"))
    assert is_out_of_memory(MemoryError())


def test_the_table_names_it(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = measured_jobs.prefill

    def limited(model: Any, ids: torch.Tensor, *given: Any, **options: Any) -> Any:
        if ids.numel() > 50:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, ids, *given, **options)

    monkeypatch.setattr(measured_jobs, "prefill", limited)
    words = ["--ckpt", "snapkv", f"model={model_folder}", "tasks=text", f"text={text_file}", "lengths=64,96"]
    assert eval([*words, "samples=2", "keep=0.5", f"output={tmp_path / 'run'}"]) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {row["length"] for row in result["rows"]} == {64}
    assert len([note for note in result["notes"] if "did not fit in memory (prefill)" in note]) == 2
    assert "did not fit in memory (prefill)" in (tmp_path / "run" / "results.md").read_text()
