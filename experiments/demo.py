"""`python -m experiments.demo`: SmolLM2 reads a document, keeps a few per cent of its cache, and answers questions.

Fetches the model if it is not there, then works offline. A table and a picture of a few samples follow.
"""

import importlib
import inspect
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cli.parser import parse, run_main
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.panels import size, table
from learnkv.evaluation.precisions import at_precision
from learnkv.evaluation.run import evaluate
from learnkv.inference.generate import generate
from learnkv.inference.known_models import KNOWN_MODELS, fetch, fetched_folder
from learnkv.inference.models import describe_model, load_model
from learnkv.inference.prefill import prefill
from learnkv.inference.prompt_format import format_prompt
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

PROG = "python -m experiments.demo"
MODULES = ("heapq", "random", "decimal", "timeit", "difflib", "statistics", "csv", "uuid", "trace", "queue")
INTRO = "Here is documentation of modules of Python's standard library.\n\n"
CHUNK = 512
NEW_TOKENS = 8
RIGHT, WRONG = "right", "wrong"


class Question(NamedTuple):
    """A question about the document, how the answer begins, and what it must have."""

    question: str
    prefix: str
    expected: str


QUESTIONS = (
    Question("Who explains heaps, according to the documentation of heapq?", " [explanation by", "Pinard"),
    Question(
        "What is the period of the Mersenne Twister in the random module?",
        " The Mersenne Twister has the period 2**",
        "19937-1",
    ),
    Question("Which book has an introduction by Tim Peters?", " Tim Peters' introduction is in the Python", "Cookbook"),
    Question("Which PEP describes the interface of the csv module?", " The interface is described by PEP", "305"),
    Question("What is the standard deviation of [2.5, 3.25, 5.5, 11.25, 11.75] in the example?", " It is", "4.389"),
    Question(
        "What is the default number of times to repeat the timer in timeit?", " The timer is repeated (default", "5"
    ),
    Question(
        "Which exception does the statistics module define?", " A single exception is defined:", "StatisticsError"
    ),
    Question("Which distributions on the circle does the random module have?", " circular uniform and von", "Mises"),
)
"""Of nineteen that were tried, those that the model answers with its full cache; the table is the measurement."""


@dataclass(frozen=True)
class DemoConfig:
    """Let a model read a document of the standard library, compress its cache, and ask questions.

    Args:
        model: the language model; `smollm2` is fetched where it is not there.
        ckpt: the trained policy.
        baseline: the method beside it.
        bytes: what the document may take, as a fraction of the bytes of its entries at 16 bits.
        precision: bits of what stays, of both policies; `16` keeps fewer entries as they are.
        tokens: length of the document.
        samples: prompts per task of the table at the end; 0: no table.
        output: folder of the table and the picture.
    """

    model: str = "smollm2"
    ckpt: str = "smollm2"
    baseline: str = "snapkv"
    bytes: float = 0.05
    precision: str = "K4V3"
    tokens: int = 4000
    samples: int = 4
    output: str = "runs/demo"

    def __post_init__(self) -> None:
        if not 0 < self.bytes <= 1 or self.tokens < 1 or self.samples < 0:
            raise UserError(
                f"bytes={self.bytes:g} tokens={self.tokens} samples={self.samples}: expected a fraction above 0 and at "
                "most 1, at least 1 token, and 0 samples or more"
            )


def demo(config: DemoConfig, resolved: str) -> None:
    """The document and its questions, then the table."""
    if config.model in KNOWN_MODELS and fetched_folder(config.model) is None:
        say("fetching SmolLM2-135M-Instruct (98 MB, once)")
        fetch(config.model)
    model, tokenizer = load_model(config.model)
    described = describe_model(model)
    policies = {
        f"{name}@{config.precision}": at_precision(load_policy(name, model=described), config.precision)
        for name in (config.ckpt, config.baseline)
    }
    head, tail, _ = format_prompt(tokenizer, INTRO + document(tokenizer, config.tokens), "\n\n{}")
    cache = read(model, tokenizer(head, add_special_tokens=False).input_ids, list(policies.values()))
    say(f"the full cache at 16 bits: {size(cache.narrow_token_nbytes() * cache.prompt_lengths[0])}")
    caches = {"full cache": cache.fork()}
    held = {"full cache": cache.full_nbytes}
    for name, policy in policies.items():
        caches[name] = policy.compress(cache.fork(), bytes=config.bytes)
        held[name] = caches[name].nbytes
    say("bytes held: " + ", ".join(f"{name} {size(count)}" for name, count in held.items()))
    rows = answers(model, tokenizer, tail, caches)
    print("\n".join(["", *table(["question", *caches], rows)]))
    right = {name: sum(row[column].startswith(RIGHT) for row in rows) for column, name in enumerate(caches, 1)}
    say(f"right answers of {len(rows)}: " + ", ".join(f"{name} {count}" for name, count in right.items()))
    if config.samples:
        say("a few samples of four tasks, read and not generated (KL from the full cache)")
        compare(config)


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def document(tokenizer: Any, tokens: int) -> str:
    """The first tokens of the documentation of `MODULES`."""
    parts = []
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"{name}: {inspect.getdoc(module) or ''}\n{getattr(module, '__about__', '')}")
    ids = tokenizer("\n\n".join(parts), add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise UserError(f"tokens={tokens}: expected at most {len(ids)}, the length of the document")
    return str(tokenizer.decode(ids[:tokens]))


def read(model: Any, ids: list[int], policies: list[Policy]) -> CompressedCache:
    """The cache of the document, read in chunks."""
    say(f"reading {len(ids):,} tokens")
    begin = time.perf_counter()
    cache = prefill(model, torch.tensor([ids], device=model.device), chunk_size=CHUNK, policies=policies)
    say(f"read in {time.perf_counter() - begin:.0f} s")
    return cache


def answers(model: Any, tokenizer: Any, tail: str, caches: dict[str, CompressedCache]) -> list[list[str]]:
    """Rows of questions with the answer from every cache."""
    rows = []
    for question, prefix, expected in QUESTIONS:
        ids = tokenizer(tail.format(question) + prefix, add_special_tokens=False).input_ids
        row = [f"{question}{prefix} …"]
        for cache in caches.values():
            read_after = torch.tensor([ids], device=model.device)
            new = generate(model, read_after, cache.fork(), max_new_tokens=NEW_TOKENS, do_sample=False)
            text = " ".join(tokenizer.decode(new[0], skip_special_tokens=True).split())
            row.append(f"{RIGHT if expected in text else WRONG}: {text}")
        rows.append(row)
    return rows


def compare(config: DemoConfig) -> None:
    """The table and the picture."""
    words = [
        f"model={config.model}",
        f"ckpt={config.ckpt}@{config.precision}",
        f"precision={config.precision}",
        f"baselines={config.baseline},expected_attention,streaming_llm",
        "tasks=niah_single_1,niah_single_2,niah_multikey_1,vt",
        "lengths=1024",
        "bytes=0.05,0.025",
        "score=forced",
        "batch_size=1",
        f"samples={config.samples}",
        f"output={config.output}",
    ]
    evaluate(*parse(EvalConfig, words, "eval"))


if __name__ == "__main__":
    sys.exit(run_main(demo, sys.argv[1:] or ["output=runs/demo"], "eval", PROG))
