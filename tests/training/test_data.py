"""Batches: what is padded where, what is counted, and that everything is a function of seed and number."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from learnkv.data.retrieval import Retrieval
from learnkv.data.retrieval_text import SPAN_QUESTIONS
from learnkv.errors import UserError
from learnkv.inference.models import load_model
from learnkv.training import seeding as seeding
from learnkv.training.data.batches import Batch, Batches, BatchSampler, collate
from learnkv.training.data.datamodule import DataModule
from learnkv.training.data.sources import QUESTIONS, Continuation, Episodes, NextText, OwnAnswers, Passage, Spans
from learnkv.training.data.text_windows import Pool, Stream
from learnkv.training.settings import DataSettings, Mixture

POOL = Pool(torch.arange(100, 1100), [1])
SOURCES = [(1.0, Spans(POOL, count=3, tokens=10, cue=4)), (1.0, NextText(POOL, tokens=8))]


def drawing(**keys: Any) -> BatchSampler:
    settings = {"lengths": (20, 40), "batch_size": 2, "query_aware": 0.5, "seed": 3}
    return BatchSampler(SOURCES, **{**settings, **keys})


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_batches_are_functions_of_seed_part_and_number() -> None:
    assert same(drawing().batch(5), drawing().batch(5))
    assert same(Batches(drawing(), range(1, 9, 2))[2], drawing().batch(5))
    for other in (drawing(seed=4).batch(5), drawing(part="validation").batch(5), drawing().batch(6)):
        assert not torch.equal(other.prompts, drawing().batch(5).prompts)


def test_both_settings_and_all_sources_are_drawn() -> None:
    batches = [drawing().batch(number) for number in range(40)]
    copies = [len(batch.continuations) // len(batch.prompts) for batch in batches]
    assert set(copies) == {1, 3}
    lengths = [batch.prompts.shape[1] for batch in batches]
    assert min(lengths) >= 20
    assert max(lengths) > 33


def test_a_question_is_read_after_the_prompt_or_with_it() -> None:
    passages = [
        Passage([1, 2, 3], [Continuation([4, 5], [6, 7]), Continuation([8], [9])]),
        Passage([1], [Continuation([2, 3, 4], [5]), Continuation([2], [3, 4])]),
    ]
    after = collate(0, passages, None)
    assert after.prompts.tolist() == [[1, 2, 3], [0, 0, 1]]
    assert after.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert after.continuations.tolist() == [[4, 5, 6], [8, 0, 0], [2, 3, 4], [2, 3, 0]]
    assert after.continuation_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]]
    # The answers 6 7, 9, 5 and 3 4 are predicted one token earlier.
    assert after.counted.tolist() == [
        [False, True, True],
        [True, False, False],
        [False, False, True],
        [True, True, False],
    ]
    before = collate(0, passages, random.Random(0))
    assert before.continuations.shape[0] == 2
    for row, (context, continuations, _) in enumerate(passages):
        read = before.prompts[row][before.prompt_mask[row].bool()].tolist()
        said = before.continuations[row][before.continuation_mask[row].bool()].tolist()
        cut = [(context + question[:-1], question[-1:] + answer[:-1]) for question, answer in continuations]
        assert (read, said) in cut
        assert before.counted[row].sum() == len(said)


def test_spans_are_found_in_their_context_and_text_goes_on() -> None:
    spans = Spans(POOL, count=3, tokens=10, cue=4)(random.Random(1), 0, 50)
    assert len(spans.context) == 50
    assert spans.context[0] == 1
    for question, answer in spans.continuations:
        assert (len(question), len(answer)) == (4, 6)
        at = spans.context.index(question[0])
        assert spans.context[at : at + 10] == question + answer
    context, [(question, answer)], _ = NextText(POOL, tokens=8)(random.Random(1), 0, 50)
    assert len(context) == 50
    assert question + answer == list(range(context[-1] + 1, context[-1] + 9))


def test_episodes_are_asked_in_the_models_own_tokens(folder: Path) -> None:
    _, tokenizer = load_model(str(folder))
    passage = Episodes("needle", tokenizer, 2)(random.Random(0), 0, 600)
    context = tokenizer.decode(passage.context)
    assert 400 < len(passage.context) <= 600
    for question, answer in passage.continuations:
        asked, said = tokenizer.decode(question), tokenizer.decode(answer)
        assert said.strip(" .") in context
        assert asked.split()[-1] in context
    with pytest.raises(UserError, match="length"):
        Episodes("needle", tokenizer, 2)(random.Random(0), 0, 20)


def test_questions_about_a_document_are_left_to_the_model(folder: Path) -> None:
    _, tokenizer = load_model(str(folder))
    source = OwnAnswers(Pool(torch.arange(5, 95).repeat(20), [0]), tokenizer, count=3, tokens=9)
    passage = source(random.Random(0), 0, 80)
    assert passage.tokens_to_generate == 9
    assert len(passage.context) == 80 - source.longest
    asked = {tuple(question) for question, _ in passage.continuations}
    assert len(asked) == 3
    assert asked <= {tuple(tokenizer(ask)["input_ids"]) for ask in QUESTIONS}
    assert [answer for _, answer in passage.continuations] == [[], [], []]
    after = collate(7, [passage, source(random.Random(1), 1, 80)], None)
    assert (after.tokens_to_generate, after.counted.any().item(), after.continuations.shape[0]) == (9, False, 6)
    assert after.counted.shape == after.continuations.shape
    before = collate(7, [passage], random.Random(0))
    assert (before.tokens_to_generate, before.continuations.shape, before.counted.tolist()) == (9, (1, 1), [[False]])
    with pytest.raises(UserError, match="no room"):
        source(random.Random(0), 0, 40)


def test_nothing_of_a_family_that_is_held_out_is_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = load_model(str(folder))
    monkeypatch.setattr(Episodes, "_ids", lambda self, text: [5] * len(text))

    def told(*hold_out: str) -> str:
        settings = DataSettings(mixture=Mixture(retrieval=1, text=0), hold_out=hold_out)
        data = DataModule(settings, tokenizer, (600, 700), seed=0)
        made = []
        episode = Retrieval.episode
        monkeypatch.setattr(Retrieval, "episode", lambda self, index: made.append(episode(self, index)) or made[-1])
        for number in range(40):
            data.samplers["train"].batch(number)
        monkeypatch.setattr(Retrieval, "episode", episode)
        return "".join(one.context + question for one in made for question, _ in one.continuations)

    signs = {"vt": "Under which names does it travel", "niah": " opens with", "span": SPAN_QUESTIONS[0][:20]}
    for family, sign in signs.items():
        assert sign in told()
        assert sign not in told(family)
    assert not any(sign in told("vt", "niah_single_2", "cwe") for sign in (signs["vt"], signs["niah"]))
    with pytest.raises(UserError, match="leaves nothing"):
        told("vt", "niah", "span")
    with pytest.raises(UserError, match="hold_out=nia: expected"):
        told("nia")


def test_the_generator_refuses_what_is_held_out(folder: Path) -> None:
    with pytest.raises(UserError, match="hold_out=vt: chain would be drawn"):
        Retrieval(100, kinds={"chain": 1.0, "needle": 1.0}, hold_out=["vt"])
    with pytest.raises(UserError, match="needle would be drawn"):
        Episodes("needle", load_model(str(folder))[1], 2, hold_out=["niah"])(random.Random(0), 0, 600)
    assert set(Retrieval(100, hold_out=["niah_multivalue"]).kinds) == {"chain", "span", "next"}


def test_a_stream_is_read_in_order_from_anywhere() -> None:
    class Rows:
        def __init__(self, rows: list[int]) -> None:
            self.rows = rows

        def skip(self, count: int) -> Any:
            return Rows(self.rows[count:])

        def take(self, count: int) -> Any:
            return Rows(self.rows[:count])

        def __iter__(self) -> Iterator[Any]:
            return iter({"input_ids": torch.tensor([number] * 4)} for number in self.rows)

    stream, rng = Stream(Rows(list(range(10))), first=2, count=5), random.Random(0)
    assert [stream.read(rng, row, 3) for row in (0, 1, 3)] == [[2] * 3, [3] * 3, [5] * 3]
    assert stream.read(rng, 7, 2) == [4, 4]  # over and over again
    assert stream.read(rng, 1, 2) == [3, 3]  # back to an earlier row
    with pytest.raises(UserError, match="no window"):
        Stream(Rows([])).read(rng, 0, 2)


def test_kept_fractions_are_spread_over_the_range() -> None:
    found = [seeding.stratified(seeding.generator(0, "keep", number), 0.02, 0.6, 2) for number in range(50)]
    middle = (0.02 * 0.6) ** 0.5
    assert all(0.02 <= low < middle <= high <= 0.6 for low, high in found)
    assert len({low for low, _ in found}) == 50
