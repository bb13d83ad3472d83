"""Decode steps on a CPU, ours and transformers' in turns: `python -m benchmarks.cpu_decode --out FILE`.

SmolLM2-135M-Instruct (`learnkv fetch smollm2`) generates after prompts whose caches are filled with random numbers:
contents change nothing. Theirs is `generate()` of the model that nothing was attached to, with its default cache; ours
is `learnkv.generate` with the full cache and with a tenth of it. Weights are shared. Contenders take turns, in
alternating order, and each turn of ours is divided by that of transformers beside it: the median of these ratios, and
between which two of them the true median lies with 95 % confidence. Seconds are those of the process on a processor,
with one thread those of the clock on a machine that does nothing else; the clock's are written beside them.

The floor is the weights' and the cache's bytes over the bandwidth that a product of a matrix and a vector reaches here.
`--kvpress PYTHON` names the interpreter of an environment with kvpress, for `benchmarks.peers.kvpress_prefill`.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks import fill
from benchmarks.results import Part, Row, arguments
from benchmarks.shapes import Shape
from learnkv import attach, generate, load_model

THEIRS, FULL, TENTH = "transformers", "learnkv full", "learnkv 0.1"
SETTINGS = ["1x1024", "1x7000", "8x1024"]
"""Batch and tokens of the prompt."""
GOAL = 1.03
"""What the interval of ours over theirs should not exceed."""

Turn = Callable[[], None]


@dataclass(frozen=True)
class Seconds:
    """Of one turn: on a processor, and on the clock."""

    cpu: float
    wall: float


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(
        __doc__,
        argv,
        pairs={"type": int, "default": 20},
        new={"type": int, "default": 8},
        threads={"type": int, "default": 1},
        settings={"nargs": "*", "default": SETTINGS, "metavar": "BATCHxTOKENS"},
        dtypes={"nargs": "+", "default": ["float32", "bfloat16"]},
        kvpress={"metavar": "PYTHON", "help": "interpreter of an environment with kvpress, measured too"},
    )
    torch.set_num_threads(options.threads)
    part = Part(options.out, "cpu_decode", options.dry_run)
    for dtype in options.dtypes:
        attached, plain = models("reference" if options.dry_run else "smollm2", dtype)
        shape = shape_of(attached)
        bandwidth = read_bandwidth(attached.dtype, 2**16 if options.dry_run else 2**26)
        for setting in ["2x64"] if options.dry_run else options.settings:
            batch, prompt = map(int, setting.split("x"))
            for row in measure(attached, plain, shape, batch, prompt, options):
                row["floor_ms"] = 1e3 * row.pop("bytes") / bandwidth
                part.add(dtype=dtype, threads=options.threads, bandwidth=bandwidth, **row)
    for row in foreign(options.kvpress, options.pairs) if options.kvpress else ():
        part.add(**row)
    part.finish()
    print("\n".join(table(part.rows)))
    return part


def models(name: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An attached model, and one with the same weights that nothing was attached to."""
    model: PreTrainedModel = load_model(name, dtype=dtype, device="cpu")[0]
    plain = type(model)(model.config).to(model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.set_attn_implementation("sdpa")
    plain.generation_config = model.generation_config
    return attach(model), plain.eval().requires_grad_(False)


def shape_of(model: PreTrainedModel) -> Shape:
    """The sizes of a Llama."""
    config = model.config
    return Shape(
        name=config.model_type,
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        dim=config.head_dim,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
    )


def read_bandwidth(dtype: torch.dtype, numbers: int) -> float:
    """Bytes per second that a product of a matrix and a vector reads, the best of several."""
    columns = 2**10
    matrix, vector = torch.randn(numbers // columns, columns).to(dtype), torch.randn(columns).to(dtype)
    seconds = [timed(lambda: torch.mv(matrix, vector)).cpu for _ in range(9)]
    return matrix.nbytes / min(seconds)


def timed(turn: Callable[[], object]) -> Seconds:
    """Seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    turn()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


@torch.no_grad()
def measure(
    attached: PreTrainedModel, plain: PreTrainedModel, shape: Shape, batch: int, prompt: int, given: argparse.Namespace
) -> Iterator[Row]:
    """A row for each contender after prompts of this length."""
    entries = {THEIRS: prompt, FULL: prompt, TENTH: prompt // 10}
    turns = {THEIRS: theirs(plain, shape, batch, prompt, given.new)}
    turns |= {name: ours(attached, shape, batch, entries[name], given.new) for name in (FULL, TENTH)}
    spent = in_turns(turns, given.pairs)
    for name, seconds in spent.items():
        element = attached.dtype.itemsize
        read = element * (shape.streamed + batch * entries[name] * shape.token_bytes) / 2  # as a Shape counts 2 bytes
        tokens = {f"{kind}_ms": 1e3 * median(seconds, kind) / given.new for kind in ("cpu", "wall")}
        about = {"B": batch, "T": prompt, "new": given.new, "pairs": given.pairs}
        row: Row = {"kernel": "decode step on a CPU", "impl": name, **about, **tokens, "bytes": read}
        for kind in () if name == THEIRS else ("cpu", "wall"):
            row[f"{kind}_ratio"] = interval(ratios(seconds, spent[THEIRS], kind))
        yield row


def ours(model: PreTrainedModel, shape: Shape, batch: int, kept: int, new: int) -> Turn:
    """`learnkv.generate` after a prompt of which `kept` entries per head are left."""
    cache = fill.compressed(model, shape, batch, kept, "uniform")
    question = torch.ones(batch, 1, dtype=torch.long)

    def turn() -> None:
        if cache.tail_length:
            cache.crop(-cache.tail_length)
        generate(model, question, cache, max_new_tokens=new, do_sample=False, eos_token_id=[])

    return turn


def theirs(model: PreTrainedModel, shape: Shape, batch: int, prompt: int, new: int) -> Turn:
    """`generate()` of transformers after a prompt that its cache holds."""
    cache = fill.dynamic(model, shape, batch, prompt)
    ids = torch.ones(batch, prompt + 1, dtype=torch.long)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def turn() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
        cache.crop(-(cache.get_seq_length() - prompt))

    return turn


def in_turns(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds of every round, in which all take a turn, every second time in reverse order; once before to warm up."""
    spent: dict[str, list[Seconds]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()
    for at in range(rounds):
        for name in list(turns)[:: 1 if at % 2 == 0 else -1]:
            spent[name].append(timed(turns[name]))
    return spent


def median(seconds: Sequence[Seconds], kind: str) -> float:
    """Of one kind of seconds."""
    middle: float = statistics.median(getattr(one, kind) for one in seconds)
    return middle


def ratios(first: Sequence[Seconds], second: Sequence[Seconds], kind: str) -> list[float]:
    """First over second, round by round."""
    return [getattr(a, kind) / getattr(b, kind) for a, b in zip(first, second, strict=True)]


def interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float]:
    """The median, and the two values between which the true one lies: order statistics, whatever the distribution."""
    ranked, count = sorted(values), len(values)
    # Probability that as few as this many values lie below the true median, for each number of them.
    below = itertools.accumulate(math.comb(count, few) * 0.5**count for few in range(count // 2))
    rank = max(sum(2 * part <= 1 - confidence for part in below) - 1, 0)
    return {"median": statistics.median(ranked), "low": ranked[rank], "high": ranked[count - 1 - rank]}


def foreign(python: str, pairs: int) -> Iterator[Row]:
    """Rows of prefill and compression beside kvpress, from its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kvpress.json"
        command = [python, "-m", "benchmarks.peers.kvpress_prefill", "--pairs", str(pairs), "--out", str(out)]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL)
        document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        for row in document["rows"]:
            yield row | {"transformers": document["environment"]["transformers"]}


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| prompt | numbers | cache | ms per token | floor | over transformers (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "floor_ms" in row:
            prompt = f"{row['B']} x {row['T']:,}"
            of = row.get("cpu_ratio")
            ratio = f"{of['median']:.3f} ({of['low']:.3f} to {of['high']:.3f})" if of else "1"
            spent = f"{row['cpu_ms']:.1f} | {row['floor_ms']:.1f}"
            lines.append(f"| {prompt} | {row['dtype']} | {row['impl']} | {spent} | {ratio} |")
    return lines


def too_slow(rows: Sequence[Row]) -> list[Row]:
    """Rows whose interval ends above the goal."""
    return [row for row in rows if "cpu_ratio" in row and row["cpu_ratio"]["high"] > GOAL]


if __name__ == "__main__":
    sys.exit(f"above {GOAL} x transformers: {len(late)} rows" if (late := too_slow(main().rows)) else 0)
