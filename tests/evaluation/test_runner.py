"""One prefill per batch for everything, bytes by the formula, and nothing done twice."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluation import KEEPS, NAMES, compare, policies, question_prompts, text_prompts
from support.models import Loaded
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.allocators import AdaKV, LearnedAllocator, Uniform
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.observation import Observation
from learnkv.evaluation import measured_jobs, runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.config import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import rows_of
from learnkv.evaluation.store import Store
from learnkv.evaluation.tabled import tabled
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy
from learnkv.scorers import Knorm, Scorer, SnapKV


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How many prompts were read in each prefill."""
    counts, plain = [], measured_jobs.prefill

    def counted(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> CompressedCache:
        counts.append(len(ids))
        return plain(model, ids, mask, **options)

    monkeypatch.setattr(measured_jobs, "prefill", counted)
    return counts


def untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what differs between two runs of the same command."""
    return {
        key: value for key, value in row.items() if key not in ("prefill_seconds", "tokens_per_second", "peak_bytes")
    }


def test_one_prefill_per_batch_for_all_policies_and_budgets(
    loaded: Loaded, tmp_path: Path, prefills: list[Any]
) -> None:
    records = compare(loaded, text_prompts(6), tmp_path)
    assert prefills == [4, 2]
    assert len(records) == 6 * (1 + 2 * 3)
    rows = rows_of(records)
    assert [(row["policy"], row["keep"], row["budget"]) for row in rows[:4]] == [
        ("full", 1, None),
        ("snapkv", 0.5, None),
        ("snapkv", 0.25, None),
        ("snapkv", 8 / 35, 8),
    ]
    assert all(row["n"] == 6 for row in rows)


def test_what_is_spent_and_held(loaded: Loaded, tmp_path: Path) -> None:
    model = loaded[0]
    layers, heads, dim, entries = 2, 2, model.config.head_dim, 35
    rows = rows_of(compare(loaded, text_prompts(4), tmp_path))
    per_entry = 2 * dim * 4
    for row in rows:
        kept = {1.0: entries, 0.5: 17.5, 0.25: 8.75}.get(row["keep"], 8) * layers * heads
        assert row["bytes_full"] == entries * layers * heads * per_entry
        assert row["spent"] == pytest.approx(kept / (entries * layers * heads), abs=1 / entries / 4)
        if row["policy"] == "full":
            assert row["bytes"] == row["bytes_full"]
        else:  # an int32 position per entry; start and length per head of each layer
            assert row["bytes"] == round(
                row["spent"] * entries * layers * heads * (per_entry + 4) + 16 * layers * heads
            )
    by_keep: dict[float, Any] = {}
    for row in rows:
        by_keep.setdefault((row["keep"], row["budget"]), set()).add(row["bytes"])
    assert all(len(held) == 1 for held in by_keep.values())


def test_bytes_of_unequal_prompts_go_by_what_each_keeps(loaded: Loaded, tmp_path: Path) -> None:
    records = compare(loaded, question_prompts(loaded[1], 3), tmp_path, ("snapkv",), KEEPS[:1], family=Answers)
    held = [one for one in records if one["policy"] == "snapkv"]
    lengths = [one["bytes_full"] for one in held]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3
    assert [one["bytes"] / held[0]["bytes"] for one in held] == pytest.approx(
        [n / lengths[0] for n in lengths], rel=0.05
    )


def test_a_kept_prompt_costs_no_kl_and_a_smaller_one_costs_more(loaded: Loaded, tmp_path: Path) -> None:
    keeps = [Budget(keep=1.0), Budget(keep=0.7), Budget(keep=0.1)]
    rows = rows_of(compare(loaded, text_prompts(5), tmp_path, ("snapkv",), keeps))
    full, whole, most, least = rows
    assert full["kl"] == 0
    assert whole["kl"] < 1e-8
    assert 1e-4 < most["kl"] < least["kl"]
    assert whole["perplexity"] == pytest.approx(full["perplexity"])
    assert {row["score_full"] for row in rows} == {full["score"]}


@pytest.mark.parametrize("family", [Text, Answers])
def test_batches_do_not_change_results(loaded: Loaded, tmp_path: Path, family: type[Any]) -> None:
    prompts = text_prompts(5) if family is Text else question_prompts(loaded[1], 5)
    for size in (1, 5):
        (tmp_path / str(size)).mkdir()
    alone, together = (
        compare(loaded, prompts, tmp_path / str(size), batch_size=size, family=family) for size in (1, 5)
    )
    for one, other in zip(alone, together, strict=True):
        assert one["fingerprint"] == other["fingerprint"]
        assert one["spent"] == other["spent"]
        assert one.get("answer") == other.get("answer")
        assert one.get("kl", 0) == pytest.approx(other.get("kl", 0), abs=1e-5)


def test_finished_samples_are_not_read_again(loaded: Loaded, tmp_path: Path, prefills: list[Any]) -> None:
    first = compare(loaded, text_prompts(3), tmp_path)
    prefills.clear()
    assert compare(loaded, text_prompts(3), tmp_path) == first
    assert prefills == []
    more = compare(loaded, text_prompts(5), tmp_path)
    assert prefills == [2]  # the two new ones
    assert [one for one in more if one["index"] < 3] == first


def test_only_what_is_missing_is_measured(
    loaded: Loaded,
    tmp_path: Path,
    prefills: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(loaded, text_prompts(3), tmp_path, ("snapkv",))
    prefills.clear()
    compressed, plain = [], Policy.compress
    monkeypatch.setattr(
        Policy, "compress", lambda self, *a, **k: compressed.append(self.spec()["allocator"]) or plain(self, *a, **k)
    )
    compare(loaded, text_prompts(3), tmp_path, ("snapkv", "adakv"))
    assert prefills == [3]
    assert [one["class_path"] for one in compressed] == ["learnkv.allocators.AdaKV"] * len(KEEPS)


def test_an_interrupted_run_continues_where_it_was(
    loaded: Loaded,
    tmp_path: Path,
    prefills: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = text_prompts(6)
    (tmp_path / "whole").mkdir()
    whole = compare(loaded, prompts, tmp_path / "whole", batch_size=2)
    measured, plain = [], Text.measure

    def stops(self: Any, *given: Any) -> tuple[list[dict[str, float]], Tensor]:
        measured.append(given)
        if len(measured) == 12:  # within the second batch of 1 + 2 * 3
            raise KeyboardInterrupt
        return plain(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Text, "measure", stops)
        with pytest.raises(KeyboardInterrupt):
            compare(loaded, prompts, tmp_path, batch_size=2)
    done = Store(tmp_path / "samples.jsonl").records
    assert len(done) == 11 * 2
    prefills.clear()
    resumed = compare(loaded, prompts, tmp_path, batch_size=2)
    assert prefills == [2, 2]
    assert len(resumed) == len(whole)
    for one, other in zip(resumed, whole, strict=True):
        assert one["fingerprint"] == other["fingerprint"]
        assert (one["loss"], one["kl"]) == pytest.approx((other["loss"], other["kl"]), abs=1e-6)
    assert all(Store(tmp_path / "samples.jsonl")[name] == record for name, record in done.items())


def test_only_prompts_that_every_policy_finished_are_compared(loaded: Loaded, tmp_path: Path) -> None:
    prompts = text_prompts(3)
    compare(loaded, prompts[:2], tmp_path)
    jobs = jobs_of(loaded[0], policies(*NAMES), KEEPS)
    found = runner.finished([Text(prompts)], jobs, Store(tmp_path / "samples.jsonl"))
    assert {record["index"] for record in found} == {0, 1}


def test_other_prompts_in_the_place_of_earlier_ones_are_not_in_one_table(loaded: Loaded, tmp_path: Path) -> None:
    """Another seed gives prompts of the same task, length and number: the full cache has the last one's."""
    first, second = text_prompts(4)[:2], [replace(prompt, index=i) for i, prompt in enumerate(text_prompts(4)[1:3])]
    compare(loaded, first, tmp_path, ("snapkv",))
    compare(loaded, second, tmp_path, ("adakv",))
    jobs = jobs_of(loaded[0], policies("adakv"), KEEPS)
    records = tabled([Text(second)], jobs, Store(tmp_path / "samples.jsonl"))
    assert {record["policy"] for record in records} == {"full", "adakv"}
    compare(loaded, second[:1], tmp_path, ("knorm",))
    jobs = jobs_of(loaded[0], policies("knorm"), KEEPS)
    records = tabled([Text(second[:1])], jobs, Store(tmp_path / "samples.jsonl"))
    assert {(record["policy"], record["index"]) for record in records} == {(n, 0) for n in ("full", "adakv", "knorm")}


def test_a_fingerprint_covers_model_prompt_policy_weights_and_budget(loaded: Loaded) -> None:
    model = loaded[0]
    (here, there) = text_prompts(2)
    learned = Policy(Knorm())
    learned.register_parameter("weight", torch.nn.Parameter(torch.zeros(2)))
    seen = set()

    def note(policy: Policy, budget: Budget = KEEPS[0], prompt: Prompt = here) -> None:
        (job,) = jobs_of(model, {"x": policy}, [budget])[1:]
        assert job.fingerprint(prompt) not in seen
        seen.add(job.fingerprint(prompt))

    note(learned)
    note(learned, prompt=there)
    note(learned, KEEPS[2])
    note(load_policy("knorm"))
    note(load_policy("snapkv"))
    note(Policy(Knorm(), sinks=5))
    with torch.no_grad():
        learned.weight.add_(1)
    note(learned)
    model.model.norm.weight[0] += 1
    note(learned)
    model.model.norm.weight[0] -= 1


def test_budgets_are_recorded_for_policies_that_learned_them(loaded: Loaded, tmp_path: Path) -> None:
    learned = Policy(Knorm())
    learned.register_parameter("weight", torch.nn.Parameter(torch.zeros(2)))
    jobs = jobs_of(loaded[0], {"learned": learned, "knorm": load_policy("knorm")}, KEEPS[:1])
    store = Store(tmp_path / "samples.jsonl")
    runner.run(loaded[0], [Text(text_prompts(2))], jobs, store, Packing(2))
    for record in store.records.values():
        assert ("budgets" in record) == (record["policy"] == "learned")
        if "budgets" in record:
            kept = torch.tensor(record["budgets"])
            assert kept.shape == (2, 2)
            assert float(kept.mean()) == pytest.approx(record["spent"])


def test_the_heuristic_below_a_learned_policy_is_found() -> None:
    learned = Policy(SnapKV(window=32), LearnedAllocator(AdaKV(), num_layers=2, num_heads=2))
    others = {"adakv": Policy(SnapKV(window=32), AdaKV()), "snapkv": Policy(SnapKV(window=32), Uniform())}
    assert runner.baselines_of({"learned": learned, **others}) == {"learned": "adakv"}


class HiddenSize(Scorer):
    """Scores entries by the size of their hidden states, which only some prefills record."""

    needs = frozenset({"hidden"})

    def forward(self, obs: Observation) -> torch.Tensor:
        assert obs.hidden is not None
        return obs.hidden.norm(dim=-1).unsqueeze(1).expand(obs.keys.shape[:3])


def test_a_scorer_gets_the_hidden_states_that_it_needs(loaded: Loaded, tmp_path: Path) -> None:
    jobs = jobs_of(loaded[0], {"hidden": Policy(HiddenSize())}, KEEPS[:1])
    store = Store(tmp_path / "samples.jsonl")
    runner.run(loaded[0], [Text(text_prompts(2))], jobs, store, Packing(2))
    assert sum(record["policy"] == "hidden" and record["kl"] > 0 for record in store.records.values()) == 2


def test_passes_of_the_model_that_a_policy_takes_are_counted(loaded: Loaded, tmp_path: Path) -> None:
    records = compare(loaded, text_prompts(2), tmp_path, names=("snapkv", "kvzip"), keeps=[Budget(keep=0.5)])
    assert {row["policy"]: row["prefills"] for row in rows_of(records)} == {"full": 1.0, "snapkv": 1.0, "kvzip": 2.0}


def test_what_is_read_stands_beside_what_is_held(loaded: Loaded, tmp_path: Path) -> None:
    """Pages are read of a cache that holds everything, and their bounds: 32 of 35 entries, then one page of 16."""
    keeps = [Budget(tokens=32), Budget(tokens=16)]
    records = compare(loaded, text_prompts(2), tmp_path, names=("snapkv", "quest"), keeps=keeps)
    full, *rows = rows_of(records)
    assert (full["read"], full["spent"]) == (1.0, 1.0)
    found = {(row["policy"], row["budget"]): row for row in rows}
    for tokens in (32, 16):
        snapkv, quest = (found[name, tokens] for name in ("snapkv", "quest"))
        assert snapkv["read"] == snapkv["spent"] == pytest.approx(tokens / 35)
        assert (quest["spent"], quest["read"]) == (1.0, pytest.approx(tokens / 35))
        assert quest["bytes"] > full["bytes"] == quest["bytes_full"] > snapkv["bytes"]
    assert 0 < found["quest", 32]["kl"] < found["quest", 16]["kl"]
    alone = rows_of(compare(loaded, text_prompts(2), tmp_path / "alone", names=("quest",), keeps=keeps))
    together = [found["quest", tokens] for tokens in (32, 16)]
    assert list(map(untimed, alone[1:])) == list(map(untimed, together))  # whatever others had recorded
