"""What is recorded for the sample viewer: exactly the kept entries, their bits, and the texts of tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluation import compare, policies, question_prompts, text_prompts
from support.models import Loaded

from learnkv.core.precision import POSITION_BYTES, TABLE_BYTES
from learnkv.evaluation import measured_jobs, runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.kept_entries import VIEW, kept_view, packed, prompt_view, token_texts, unpacked, viewed_prompts
from learnkv.evaluation.precisions import at_precision
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

SHAPE = (2, 2)  # layers and heads of the tiny model
HALF = [Budget(keep=0.5)]


def compressed(loaded: Loaded, policy: Policy, keep: float = 0.4) -> Any:
    """Prompts of 40 and 31 tokens, the shorter one padded on the left."""
    ids = torch.randint(2, 400, (2, 40), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return policy.compress(prefill(loaded[0], ids, mask, policies=[policy]), keep=keep)


@pytest.mark.parametrize("name", ["adakv", "streaming_llm", "full"])
def test_views_hold_exactly_the_kept_positions(loaded: Loaded, name: str) -> None:
    cache = compressed(loaded, load_policy(name))
    for row, tokens in enumerate((40, 31)):
        view = kept_view(cache, row)
        kept = unpacked(view)
        assert view["shape"] == [*SHAPE, tokens] == list(kept.shape)
        assert view["bits"] is None
        for layer, head in np.ndindex(SHAPE):
            assert np.flatnonzero(kept[layer, head]).tolist() == cache.kept_positions(layer, row, head).tolist()
        assert kept.mean() == pytest.approx(cache.spent[row])


@pytest.mark.parametrize("precision", [4, "K8V2"])
def test_bits_are_those_of_the_stored_bytes(loaded: Loaded, precision: int | str) -> None:
    cache = compressed(loaded, at_precision(load_policy("adakv"), precision))
    dim = cache.compressed_layers()[0].sizes[1]
    for row, nbytes in enumerate(cache.row_nbytes()):
        view = kept_view(cache, row)
        counts = unpacked(view).sum(-1)
        stored = (np.array(view["bits"]) * counts * 2 * dim / 8).sum()
        tables = TABLE_BYTES * SHAPE[0] * SHAPE[1] + TABLE_BYTES * SHAPE[1]  # and the shared one of no entries
        assert stored + counts.sum() * POSITION_BYTES + tables == pytest.approx(nbytes)


def test_packing_is_exact_for_any_number_of_bits() -> None:
    for tokens in (1, 7, 8, 61):
        kept = np.random.default_rng(tokens).random((3, 2, tokens)) < 0.3
        assert (unpacked({"shape": [3, 2, tokens], "kept": packed(kept)}) == kept).all()


def test_texts_of_tokens_join_to_the_text(loaded: Loaded) -> None:
    text = "Grüße an 3 Hühner 🐔 and\n\nhens <s> 漢字"
    ids = loaded[1](text, add_special_tokens=False).input_ids
    texts = token_texts(loaded[1], ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "🐔" in [part.strip() for part in texts]  # whole, where its last byte is
    assert "" in texts
    assert token_texts(loaded[1], []) == []


def test_bytes_that_are_no_text_are_shown_as_such(loaded: Loaded) -> None:
    ids = loaded[1]("🐔", add_special_tokens=False).input_ids
    cut = ids[:-1]
    assert "".join(token_texts(loaded[1], cut)) == loaded[1].decode(cut)
    assert len(token_texts(loaded[1], cut * 20)) == 20 * len(cut)


def test_a_tokenizer_is_not_needed() -> None:
    prompt = Prompt("text", 8, "query_agnostic", 0, [5, 6], [7])
    assert prompt_view(None, prompt) == {"tokens": ["[5]", "[6]"], "after": ""}


def test_viewed_prompts_take_turns_over_tasks() -> None:
    def prompt(task: str, index: int) -> Prompt:
        return Prompt(task, 8, "query_agnostic", index, [1, index], [ord(task)])

    prompts = {(task, index): prompt(task, index) for task in "ab" for index in range(3)}
    chosen = viewed_prompts(prompts.values(), 3)
    assert chosen == {prompts[key].digest for key in (("a", 0), ("b", 0), ("a", 1))}
    assert viewed_prompts(prompts.values(), 99) == {each.digest for each in prompts.values()}
    assert viewed_prompts(prompts.values(), 0) == frozenset()


def test_only_viewed_prompts_have_views_and_more_are_measured_when_asked_for(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = question_prompts(loaded[1], 4)
    plain = compare(loaded, prompts, tmp_path, ("snapkv",), HALF, family=Answers)
    assert not any(VIEW in record for record in plain)
    read: list[int] = []
    prefill = measured_jobs.prefill
    monkeypatch.setattr(
        measured_jobs, "prefill", lambda model, ids, *a, **k: read.append(len(ids)) or prefill(model, ids, *a, **k)
    )

    def views(count: int) -> list[int]:
        read.clear()
        families, jobs = [Answers(prompts, loaded[1])], jobs_of(loaded[0], policies("snapkv"), HALF)
        store = Store(tmp_path / "samples.jsonl")
        runner.run(loaded[0], families, jobs, store, Packing(4), viewer=count)
        records = runner.finished(families, jobs, store)
        assert [(r["score"], r["answer"]) for r in records] == [(r["score"], r["answer"]) for r in plain]
        return [record["index"] for record in records if VIEW in record]

    assert views(2) == [0, 1, 0, 1]
    assert sum(read) == 2  # the others were known
    assert views(2) == [0, 1, 0, 1]
    assert views(1) == [0, 1, 0, 1]
    assert not read
    assert views(3) == [0, 1, 2, 0, 1, 2]
    assert sum(read) == 1


def test_views_of_the_full_cache_have_the_prompt(loaded: Loaded, tmp_path: Path) -> None:
    prompts = question_prompts(loaded[1], 1)
    families, jobs = [Answers(prompts, loaded[1])], jobs_of(loaded[0], policies("adakv"), HALF)
    store = Store(tmp_path / "samples.jsonl")
    runner.run(loaded[0], families, jobs, store, Packing(4), viewer=1)
    full, adakv = runner.finished(families, jobs, store)
    assert "".join(full[VIEW]["tokens"]) == loaded[1].decode(prompts[0].prefill_ids)
    assert full[VIEW]["after"] == "\nWhat? It"
    assert unpacked(adakv[VIEW]).mean() == pytest.approx(adakv["spent"])
    assert len(full[VIEW]["tokens"]) == adakv[VIEW]["shape"][-1]


def test_text_without_a_tokenizer_is_viewed_too(loaded: Loaded, tmp_path: Path) -> None:
    jobs = jobs_of(loaded[0], policies("snapkv"), HALF)
    store = Store(tmp_path / "samples.jsonl")
    runner.run(loaded[0], [Text(text_prompts(2))], jobs, store, Packing(4), viewer=1)
    assert sum(VIEW in record for record in store.records.values()) == 2
