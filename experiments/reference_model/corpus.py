"""The reference model's tokenizer and its pool of training tokens."""

import gzip
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from learnkv.data import words
from learnkv.data.haystack import docstrings

BOS, EOS = "<s>", "</s>"


def read_texts(paths: list[str]) -> Iterator[str]:
    """Documents of .txt and .jsonl files (field "text"), also gzipped, then the standard library's docstrings."""
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else open(path, encoding="utf-8") as file:
            if ".jsonl" in Path(path).name:
                yield from (json.loads(line)["text"] for line in file)
            else:
                yield file.read()
    yield "\n".join(docstrings())


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; every prompt begins with the beginning-of-text token.

    The first 60,000 characters of each text are used, and enough capitals and hexadecimal digits after a space
    that every variable and UUID begins with a token of its own.
    """
    rng = random.Random(0)
    names = [" ".join(rng.choices(string.ascii_uppercase, k=2000)) for _ in range(20)]
    names += [" ".join(words.random_uuid(rng, "train") for _ in range(200))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*(text[:60_000] for text in texts), *names], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0), (EOS, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def tokenise(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Token ids of all texts in one int16 array, whitespace kept, an end-of-text token after each."""
    encode = tokenizer.backend_tokenizer.encode_batch
    parts: list[np.ndarray] = []
    for text in texts:
        pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        parts += [np.array(e.ids, dtype=np.int16) for e in encode(pieces, add_special_tokens=False)]
        parts.append(np.array([tokenizer.eos_token_id], dtype=np.int16))
    return np.concatenate(parts)


def prepare(paths: list[str], vocab_size: int, folder: Path) -> tuple[PreTrainedTokenizerFast, list[np.ndarray]]:
    """Tokenizer and token pools of a run, made once and then read from `folder`: all text, the docstrings alone."""
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(read_texts(paths), vocab_size).save_pretrained(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pool = folder / "pool.npy"
    if not pool.exists():
        np.save(pool.with_suffix(".part.npy"), tokenise(read_texts(paths), tokenizer))
        pool.with_suffix(".part.npy").replace(pool)
    ids = np.load(pool)
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    return tokenizer, [ids, ids[ends[-2] + 1 :] if len(ends) > 1 else ids]
