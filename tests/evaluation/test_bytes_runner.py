"""Budgets of bytes, measured: exact for every prompt of a batch, recorded, resumed, and never above what was asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import eval
from support.evaluation import compare, policies, question_prompts, text_prompts
from support.models import Loaded

from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.evaluation import runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.precisions import at_precisions
from learnkv.evaluation.results import rows_of
from learnkv.evaluation.sharing import for_one_prompt
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.text import Text
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy
from learnkv.precision.learned import LearnedPrecision
from learnkv.scorers import SnapKV

HALF, COUNT = Budget(bytes=0.5), Budget(bytes=3 * 2**10)


def run(loaded: Loaded, family: Any, made: dict[str, Policy], path: Path, budgets: list[Budget], size: int = 4) -> Any:
    jobs, store = jobs_of(loaded[0], made, budgets), Store(path / "samples.jsonl")
    runner.run(loaded[0], [family], jobs, store, Packing(size))
    return runner.finished([family], jobs, store)


def test_bytes_of_every_prompt_of_a_batch_are_its_own(loaded: Loaded, tmp_path: Path) -> None:
    model = loaded[0]
    prompts = question_prompts(loaded[1], 4)
    made = {**policies("snapkv"), **at_precisions(policies("snapkv"), ["K4V2"])}
    (tmp_path / "alone").mkdir()
    together = run(loaded, Answers(prompts, loaded[1]), made, tmp_path, [HALF, COUNT])
    alone = run(loaded, Answers(prompts, loaded[1]), made, tmp_path / "alone", [HALF, COUNT], size=1)
    token = 2 * 2 * model.config.head_dim * model.config.num_key_value_heads * model.config.num_hidden_layers
    sizes = [token * len(prompt.prefill_ids) for prompt in prompts]
    assert len(set(sizes)) == 4
    for one, other in zip(together, alone, strict=True):
        assert (one["bytes"], one["spent"], one["asked_bytes"]) == (
            other["bytes"],
            other["spent"],
            other["asked_bytes"],
        )
        if one["policy"] == "full":
            assert (one["asked_bytes"], one["precision"]) == (None, "32")
            continue
        assert one["bytes_full"] == sizes[one["index"]]
        asked = sizes[one["index"]] // 2 if one["bytes_budget"] == 0.5 else 3072
        assert one["asked_bytes"] == asked
        assert one["asked"] == pytest.approx(asked / sizes[one["index"]], abs=1e-3) or one["asked"] == 1
        most = {"snapkv": 36, "snapkv@K4V2": 18}[one["policy"]]  # of an entry: nothing more would fit
        assert asked - most < one["bytes"] <= asked or one["spent"] == 1
        assert one["precision"] == {"snapkv": "16", "snapkv@K4V2": "K4V2"}[one["policy"]]
    spent = {(one["policy"], one["bytes_budget"], one["index"]): one["spent"] for one in together}
    assert all(spent["snapkv@K4V2", 0.5, at] > 1.5 * spent["snapkv", 0.5, at] for at in range(4))


def test_rows_keep_budgets_and_precisions_apart(loaded: Loaded, tmp_path: Path) -> None:
    made = {**policies("knorm"), **at_precisions({**policies("full"), **policies("knorm")}, [16, 4])}
    budgets = [Budget(keep=0.5), HALF]
    rows = {
        (row["policy"], row["keep"], row["bytes_budget"]): row
        for row in rows_of(run(loaded, Text(text_prompts(3)), made, tmp_path, budgets))
    }
    names = ("knorm", "knorm@16", "knorm@4")
    wanted = {(name, *budget) for name in names for budget in ((0.5, None), (None, 0.5))}
    assert rows.keys() == {("full", 1.0, None), ("full@4", 1.0, None), *wanted}
    assert rows["knorm", None, 0.5]["kl"] == pytest.approx(rows["knorm@16", None, 0.5]["kl"])
    whole, full = rows["full@4", 1.0, None], rows["full", 1.0, None]
    assert (whole["spent"], whole["precision"], full["precision"]) == (1.0, "4", "32")
    assert whole["bytes_full"] == full["bytes_full"] / 2  # at 16 bits, of a model of 32
    assert 0.25 < whole["bytes"] / whole["bytes_full"] < 0.8
    assert 0 < whole["kl"] < rows["knorm@4", 0.5, None]["kl"]
    held = [rows[name, 0.5, None]["bytes"] for name in names]
    assert held == sorted(held, reverse=True)
    assert rows["knorm", 0.5, None]["asked_bytes"] is None


def test_a_run_over_bytes_is_resumed_and_extended(loaded: Loaded, tmp_path: Path) -> None:
    first = compare(loaded, text_prompts(3), tmp_path, ("knorm",), [HALF])
    again = compare(loaded, text_prompts(3), tmp_path, ("knorm",), [HALF, COUNT, Budget(keep=0.5)])
    kept = [one for one in again if one["policy"] == "full" or one["bytes_budget"] == 0.5]
    assert kept == first
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 4
    assert {json.dumps(line["bytes_budget"]) for line in lines} == {"null", "0.5", "3072"}


def test_a_fingerprint_knows_the_kind_and_the_precision(loaded: Loaded) -> None:
    (prompt,) = text_prompts(1)
    made = at_precisions(policies("knorm"), [16, 4, "K4V3"])
    budgets = [Budget(keep=0.5), HALF, Budget(bytes=0.5000001), Budget(keep=0.5000001), COUNT, Budget(bytes=3073)]
    jobs = jobs_of(loaded[0], {**policies("knorm"), **made}, budgets)
    assert len({job.fingerprint(prompt) for job in jobs}) == len(jobs) == 1 + 4 * len(budgets)


def learned() -> Policy:
    allocator = LearnedAllocator(Uniform(), num_layers=2, num_heads=2, by="scores")
    policy = Policy(SnapKV(), allocator, precision=LearnedPrecision(num_layers=2, num_heads=2))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    return policy


def test_shared_scores_change_no_level(loaded: Loaded) -> None:
    """The allocator that is wrapped ranks entries of all heads, as the policy's own does."""
    policy = learned()
    ids = torch.randint(2, 400, (2, 96), generator=torch.Generator().manual_seed(3))
    cache = prefill(loaded[0], ids, policies=[policy])
    shared = for_one_prompt(policy)
    for part in (0.3, 0.15):
        one, other = (each.plan(cache.fork(), bytes=part).levels for each in (shared, policy))
        assert one is not None
        assert other is not None
        assert torch.equal(one.counts, other.counts)


def test_a_learned_precision_is_named(loaded: Loaded, tmp_path: Path) -> None:
    _, row = rows_of(run(loaded, Text(text_prompts(2)), {"learned": learned()}, tmp_path, [HALF]))
    assert (row["precision"], row["bytes_budget"]) == ("learned", 0.5)
    assert row["bytes"] <= row["asked_bytes"]


@pytest.fixture
def words(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    common = [f"model={model_folder}", f"text={text_file}", f"output={tmp_path / 'run'}", "lengths=64", "samples=2"]
    return [*common, "tasks=text"]


def test_bytes_and_precisions_as_they_are_typed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval([*words, "--ckpt", "snapkv", "baselines=knorm,kvzip", "bytes=0.5,4KB", "precision=8,K4V3"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["schema"] == 2
    names = ["full", "snapkv", "full@8", "knorm@8", "kvzip@8", "full@K4V3", "knorm@K4V3", "kvzip@K4V3"]
    assert list(dict.fromkeys(row["policy"] for row in results["rows"])) == names
    assert len(results["rows"]) == 3 + 2 * 5
    keys = {"asked_bytes", "bytes", "bytes_full", "precision", "metric", "score", "score_full", "kl", "n", "stderr"}
    assert all(keys <= row.keys() for row in results["rows"])
    assert "| policy | keep 1 | bytes 0.5 | bytes 4KB |" in capsys.readouterr().out
    assert eval([f"config={tmp_path / 'run' / 'config.yaml'}"]) == 0
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again["rows"] == results["rows"]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["bytes=0"], "bytes=0"),
        (["bytes=64XB"], "bytes=64XB: expected a fraction"),
        (["bytes=1.5"], "bytes=1.5: expected a fraction"),
        (["bytes=0.001"], "snapkv: bytes="),
        (["bytes=64B"], "snapkv: bytes=64: hold"),
        (["bytes=0.5", "baselines=quest"], "quest: bytes=0.5: expected a policy without pages"),
        (["bytes=0.5", "baselines=quest", "precision=4"], "quest: pages="),
        (["bytes=0.5", "baselines=h2o_decode", "precision=4"], "h2o_decode@4: bytes=0.5: H2O holds statistics"),
        (["bytes=0.5", "baselines=knorm", "precision=5"], "precision=5: expected 16, 8, 4, 3, 2 bits"),
        (["budget=8", "baselines=knorm", "precision=4"], "precision=4: expected keep= or bytes=, got budget="),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], capsys: pytest.CaptureFixture[str], typed: list[str], line: str
) -> None:
    assert eval([*words, "--ckpt", "snapkv", *typed]) == 2
    said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(said) == 1
    assert line in said[0]
