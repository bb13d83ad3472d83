"""The model's own answers: what is said, where it is counted, and that it is said once."""

from pathlib import Path

import pytest
import torch
from support.models import Loaded
from transformers import PreTrainedTokenizerBase

from learnkv.inference.generate import generate
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill
from learnkv.training.data.batches import Batch, BatchSampler
from learnkv.training.data.self_generated import AnswerCache
from learnkv.training.data.sources import OwnAnswers
from learnkv.training.data.text_windows import Pool

POOL = Pool(torch.randint(5, 95, (3000,), generator=torch.Generator().manual_seed(0)), [0])


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Loaded:
    return load_model(str(folder))


def batch(tokenizer: PreTrainedTokenizerBase, number: int = 0, query_aware: float = 0.0) -> Batch:
    source = OwnAnswers(POOL, tokenizer, count=3, tokens=6)
    return BatchSampler([(1.0, source)], (70, 90), 2, query_aware, seed=1).batch(number)


@pytest.mark.parametrize("query_aware", [0.0, 1.0])
def test_answers_are_those_of_the_full_cache_and_are_counted(tiny: Loaded, query_aware: float) -> None:
    model, tokenizer = tiny
    asked = batch(tokenizer, query_aware=query_aware)
    cache = prefill(model, asked.prompts, asked.prompt_mask)
    done = AnswerCache(None, seed=5).complete(model, asked, cache)
    assert done.tokens_to_generate == 0
    assert cache.tail_length == 0
    for row, question in enumerate(asked.continuations):
        length = int(asked.continuation_mask[row].sum())
        read = done.continuations[row][done.continuation_mask[row].bool()]
        assert torch.equal(read[:length], question[:length])
        counted = done.counted[row].nonzero().flatten()
        assert counted[0] == length - 1  # where the first token of the answer is predicted
        assert len(counted) == len(read) - length + 1 <= 6
    again = AnswerCache(None, seed=5).complete(model, asked, cache)
    assert all(torch.equal(a, b) for a, b in zip(again[1:6], done[1:6], strict=True))
    other = AnswerCache(None, seed=6).complete(model, asked, cache)
    assert not torch.equal(other.continuations, done.continuations)


def test_an_answer_is_said_once(tiny: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    asked = batch(tokenizer)
    cache = prefill(model, asked.prompts, asked.prompt_mask)
    done = AnswerCache(tmp_path / "kept", seed=5).complete(model, asked, cache)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    said = []
    monkeypatch.setattr(
        "learnkv.training.data.self_generated.generate", lambda *a, **k: said.append(1) or generate(*a, **k)
    )
    known = AnswerCache(tmp_path / "kept", seed=5).complete(model, asked, cache)
    assert not said
    assert all(torch.equal(a, b) for a, b in zip(known[1:6], done[1:6], strict=True))
    AnswerCache(tmp_path / "kept", seed=6).complete(model, asked, cache)
    assert len(said) == 1
    other = batch(tokenizer, number=1)
    AnswerCache(tmp_path / "kept", seed=5).complete(model, other, prefill(model, other.prompts, other.prompt_mask))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0  # another model
    AnswerCache(tmp_path / "kept", seed=5).complete(model, asked, cache)
    with torch.no_grad():
        model.lm_head.weight[0, 0] -= 1.0
    assert len(said) == 3
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_an_answer_ends_where_the_model_ends_it(tiny: Loaded) -> None:
    model, tokenizer = tiny
    asked = batch(tokenizer)
    eos = 1
    said = torch.full((6, 6), 9)
    said[0, 2], said[1, 0], said[1, 1:] = eos, eos, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("learnkv.training.data.self_generated.generate", lambda *a, **k: said)
        cache = prefill(model, asked.prompts, asked.prompt_mask)
        done = AnswerCache(None, seed=5).complete(model, asked, cache)
    assert done.counted.sum(-1).tolist() == [3, 1, 6, 6, 6, 6]
    read = done.continuations[0][done.continuation_mask[0].bool()]
    assert read[-2:].tolist() == [9, 9]  # of the last token of an answer, eos, only the prediction counts
