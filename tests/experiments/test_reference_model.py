import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from experiments.reference_model.config import ReferenceConfig, Shape
from experiments.reference_model.corpus import train_tokenizer
from experiments.reference_model.measure import Figure, perplexity, ruler_figure
from experiments.reference_model.model_card import missed, table
from experiments.reference_model.questions import Difficulty
from experiments.reference_model.rows import ASKED, IGNORE, READ, RowMaker, Stage
from experiments.reference_model.training import ReferenceTraining, train
from learnkv.cli.parser import parse
from learnkv.data.ruler import Ruler
from learnkv.data.words import split_of
from learnkv.errors import UserError
from learnkv.inference.models import REFERENCE, load_model

TEXT = "The old house stood near the river, and nobody knew who had built it or why. " * 40
TINY = Shape(
    vocab_size=400,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=512,
)
STAGES = [
    Stage(steps=3, lengths={160: 1.0}, kinds={"text": 1, "repeat": 1, "single": 1}, level=Difficulty(needles=2)),
    Stage(steps=3, lengths={384: 1.0}, kinds={"mixed": 1, "dense": 1, "span": 1}),
]
CONFIG = ReferenceConfig(stages=STAGES, shape=TINY, warmup=2, cooldown=3, tokens_per_step=800, device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(iter([TEXT]), 400)


@pytest.fixture(scope="module")
def pools(tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray[Any, Any]]:
    ids = np.array(tokenizer(TEXT, add_special_tokens=False)["input_ids"] * 4, dtype=np.int16)
    return [ids, ids[len(ids) // 2 :]]


def test_single_digits_and_the_beginning_of_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize(" 407") == ["Ġ", "4", "0", "7"]
    assert tokenizer("The")["input_ids"][0] == tokenizer.bos_token_id == 0
    assert tokenizer.decode(tokenizer(" Zoë 12-ab.\n")["input_ids"], skip_special_tokens=True) == " Zoë 12-ab.\n"


@pytest.mark.parametrize("kind", READ + ASKED)
def test_a_row_has_its_length_and_asks_for_what_stands_there(
    tokenizer: PreTrainedTokenizerBase, pools: list[np.ndarray[Any, Any]], kind: str
) -> None:
    for seed in range(5):
        ids, labels = RowMaker(tokenizer, pools, Difficulty(), random.Random(seed)).row(kind, 480)
        assert ids.shape == labels.shape == (480,)
        assert ids[0] == tokenizer.bos_token_id
        wanted = labels != IGNORE
        assert wanted.sum() > 0
        assert (ids[wanted] == labels[wanted]).all()
        assert (wanted[1:].all() and not wanted[0]) or kind != "text"
        if kind in ASKED:
            first = int(wanted.argmax())
            told = tokenizer.decode(ids[:first])
            answers = [part for part in tokenizer.decode(labels[wanted]).split("</s>") if part]
            values = [word.strip(".,") for answer in answers for word in answer.split()]
            values = [value for value in values if value not in ("is", "first", "second", "third", "fourth")]
            assert values
            assert all(value in told for value in values)
            assert {split_of(value) for value in values} == {"train"}


def test_a_question_that_cannot_fit_is_refused(
    tokenizer: PreTrainedTokenizerBase, pools: list[np.ndarray[Any, Any]]
) -> None:
    with pytest.raises(UserError, match="no row of kind mixed fits in 12 tokens"):
        RowMaker(tokenizer, pools, Difficulty(), random.Random(0)).row("mixed", 12)
    with pytest.raises(UserError, match="kinds=riddle: expected some of text, "):
        Stage(steps=1, lengths={96: 1.0}, kinds={"riddle": 1.0})


def test_the_rate_is_a_trapezoid_over_the_stages() -> None:
    slower = dataclasses.replace(STAGES[0], rate=0.5)
    config = dataclasses.replace(CONFIG, learning_rate=2.0, stages=[slower, STAGES[1]])
    assert [config.rate_at(step) for step in range(6)] == pytest.approx([1 / 2, 1, 1, 2, 4 / 3, 2 / 3])
    assert [CONFIG.stage_at(step) for step in range(6)] == [STAGES[0]] * 3 + [STAGES[1]] * 3


def test_kinds_weigh_by_rows_and_questions_by_labels(
    tokenizer: PreTrainedTokenizerBase, pools: list[np.ndarray[Any, Any]]
) -> None:
    run = ReferenceTraining(CONFIG, tokenizer, pools)
    wanted = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    weights = run._weights(wanted, ["text", "single", "chain", "text"])
    assert weights.tolist() == pytest.approx([0.5 / 6, 0.5 / 3, 0.5 / 3, 0.5 / 6])


def test_a_resumed_run_equals_the_uninterrupted_one(
    tokenizer: PreTrainedTokenizerBase, pools: list[np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    whole = ReferenceTraining(CONFIG, tokenizer, pools)
    seen = [whole.train_step() for _ in range(5)]
    first = ReferenceTraining(CONFIG, tokenizer, pools)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "checkpoint.pt")
    resumed = ReferenceTraining(dataclasses.replace(CONFIG, seed=0), tokenizer, pools)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.step == 2
    assert [resumed.train_step() for _ in range(3)] == seen[2:]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    other = ReferenceTraining(dataclasses.replace(CONFIG, seed=1), tokenizer, pools)
    assert not torch.equal(other.batch(0)[0], whole.batch(0)[0])


def test_training_learns_and_exports_a_model_that_loads(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    stage = Stage(steps=25, lengths={64: 1.0}, kinds={"text": 1.0})
    config = dataclasses.replace(
        CONFIG, text=[str(text)], output=str(tmp_path / "run"), stages=[stage], log_every=12, learning_rate=2e-2
    )
    told: list[str] = []
    folder = train(config, told.append)
    losses = [float(line.split("text ")[1].split("/")[0]) for line in told if line.startswith("step ")]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float16
    assert len(tokenizer) == 400
    assert "local" not in (folder / "tokenizer_config.json").read_text()
    told.clear()
    train(config, told.append)
    assert told[0] == "resumed at step 25"
    assert len(told) == 2


def test_perplexity_against_numbers_by_hand() -> None:
    class Fixed:
        """Gives token 1 three quarters and token 0 the rest, whatever came before."""

        device = "cpu"

        def __call__(self, input_ids: Tensor) -> type[Any]:
            logits = torch.tensor([0.25, 0.75]).log().expand(1, input_ids.shape[1], 2)
            return type("Output", (), {"logits": logits})

    found = perplexity(Fixed(), iter([torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])]))
    assert found.tokens == 4
    assert found.model == pytest.approx((0.75**3 * 0.25) ** (-1 / 4))
    assert found.unigram == pytest.approx((0.75**3 * 0.25) ** (-1 / 4))


def test_the_card_names_what_misses_its_bar() -> None:
    figures = [Figure("vt", 1024, 50, 79.9, 1.0), Figure("niah_multivalue", 1024, 50, 95.0, 1.0)]
    figures += [Figure("vt", 512, 50, 10.0, 1.0), Figure("cwe", 1024, 50, 0.0, 0.0)]
    assert missed(figures) == ["vt"]
    assert "| vt | 80 | 10.0 ± 1.0 | 79.9 ± 1.0 |" in table(figures).split("\n")
    assert "| cwe | - | does not fit | 0.0 ± 0.0 |" in table(figures).split("\n")


def test_the_shipped_recipe_parses() -> None:
    config, resolved = parse(ReferenceConfig, ["config=reference", "text=a.txt,b.jsonl.gz"], "train")
    assert config.text == ["a.txt", "b.jsonl.gz"]
    assert config.stages[0].lengths == {96: 1.0}
    assert {length for stage in config.stages for length in stage.lengths} >= {1024, 2048}
    assert config.shape.num_hidden_layers * config.shape.num_key_value_heads >= 24
    assert "cooldown: 840" in resolved


def test_the_shipped_model_retrieves() -> None:
    weights = REFERENCE / "model.safetensors"
    assert weights.stat().st_size < 10_000_000
    model, tokenizer = load_model("reference")
    config = model.config
    assert config.num_hidden_layers * config.num_key_value_heads >= 24
    assert config.max_position_embeddings >= 2048
    assert config.num_attention_heads > config.num_key_value_heads
    found = ruler_figure(model, tokenizer, Ruler(tokenizer, 512), "niah_multikey_1", samples=4, batch=4)
    assert found.score >= 75
    assert (REFERENCE / "README.md").read_text().count("| niah_") == 8
