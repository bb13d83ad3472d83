"""A tiny model that reads characters, stored as any other model is, and a text file to read."""

import random
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    characters = ["<s>", "</s>", "<unk>", *string.printable]
    made = Tokenizer(WordLevel({one: at for at, one in enumerate(characters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "some.txt"
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 8))) for _ in range(200)]
    file.write_text(" ".join(rng.choices(words, k=2000)))
    return file


POLICY = """
policy:
  class_path: learnkv.Policy
  init_args:
    scorer:
      class_path: learnkv.scorers.LearnedScorer
      init_args: {base: {class_path: learnkv.scorers.SnapKV, init_args: {window: 8}}, width: 4, window: 8}
    allocator:
      class_path: learnkv.allocators.LearnedAllocator
      init_args: {base: {class_path: learnkv.allocators.Uniform}, conditioned: true, window: 8}
    sinks: 2
    recent: 4
"""


@pytest.fixture
def words(folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """What is typed for a short run: two contexts a batch, both settings, both kinds of continuation."""
    config = tmp_path / "tiny.yaml"
    config.write_text(POLICY)
    return [
        f"config={config}",
        f"model={folder}",
        f"text={text_file}",
        f"output={tmp_path / 'run'}",
        "mixture.reconstruction=1",
        "mixture.text=1",
        "lengths=60,90",
        "continuations=2",
        "continuation_tokens=12",
        "keep_range=0.1,0.6",
        "query_aware=0.5",
        "validation_batches=2",
        "wandb=null",
        "trainer.accelerator=cpu",
        "trainer.max_steps=4",
        "trainer.log_every_n_steps=1",
    ]
