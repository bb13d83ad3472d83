"""What a decode step asks of a machine, ours and others', counted on a CPU: `python -m benchmarks.cpu_gates`.

Bytes, waits, operations and allocations are counted by `benchmarks.meters` while tokens are generated after prompts of
several lengths. Slopes in the length take out weights and whatever else does not depend on the prompt. kvpress needs an
older transformers: `--kvpress PYTHON` names the interpreter of an environment that has it.

Ours is what runs on a CPU, the references: attention logits, which the kernels keep to themselves, are counted with it,
while SDPA's are not (4 query heads on a head of 128: 8 % of the keys and values).
"""

import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.meters import Counts, Meter, slope
from benchmarks.results import Part, Row, arguments
from benchmarks.shapes import LLAMA_8B

SHAPE = dataclasses.replace(
    LLAMA_8B, name="Llama-3.1-8B's heads", layers=4, hidden=256, ffn=512, heads=8, kv_heads=2, vocabulary=512
)
TOKEN = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.dim * 4
"""Bytes of keys and values per prompt token and row, float32."""

PROMPTS, NEW, KEEP, BUDGET = (768, 1536, 2304), (4, 12), 0.1, 128

Run = Callable[[PreTrainedModel, Tensor, int], tuple[Counts, int]]
"""Reads a prompt [B, T], then counts the generation of so many tokens; with the bytes that are held at its end."""


def dynamic(padded: bool) -> Run:
    """Default cache of transformers; with padding in the batch or without."""

    def run(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[Counts, int]:
        return _generated(model, ids, new, DynamicCache(config=model.config), padded)

    return run


def static(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[Counts, int]:
    """Preallocated cache of transformers, just as long as it has to be."""
    return _generated(model, ids, new, StaticCache(config=model.config, max_cache_len=ids.shape[1] + new), False)


def _generated(model: PreTrainedModel, ids: Tensor, new: int, cache: Any, padded: bool) -> tuple[Counts, int]:
    mask = torch.ones_like(ids)
    mask[0, : 8 * padded] = 0
    model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with Meter() as counts:
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, disable_compile=True, **settings)
    return counts, sum(held.nbytes for layer in cache.layers for held in (layer.keys, layer.values))


def learnkv(policy: str, **spend: float) -> Run:
    """Ours, under a policy of the package."""

    def run(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[Counts, int]:
        from learnkv import attach, detach, generate, load_policy, prefill

        cache = load_policy(policy).compress(prefill(attach(model), ids[:, :-1]), **spend)
        with Meter() as counts:
            generate(model, ids[:, -1:], cache, max_new_tokens=new)
        detach(model)
        return counts, cache.nbytes

    return run


def kvpress(name: str) -> Run:
    """kvpress, a tenth kept; the shortest loop there is around the model."""

    def run(model: PreTrainedModel, ids: Tensor, new: int) -> tuple[Counts, int]:
        from kvpress import AdaKVPress, SnapKVPress

        press = SnapKVPress(1 - KEEP) if name == "SnapKV" else AdaKVPress(SnapKVPress(1 - KEEP))
        cache = DynamicCache()
        with press(model):
            model(input_ids=ids[:, :-1], past_key_values=cache, logits_to_keep=1)
        token = ids[:, -1:]
        with Meter() as counts:
            for at in range(new):
                position = torch.full_like(token, ids.shape[1] - 1 + at)
                token = model(input_ids=token, position_ids=position, past_key_values=cache).logits[:, -1:].argmax(-1)
        held = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        for module in model.modules():
            held += [one for one in getattr(module, "masked_key_indices", None) or () if isinstance(one, Tensor)]
            if hasattr(module, "masked_key_indices"):
                module.masked_key_indices = None
        return counts, sum(one.nbytes for one in held)

    return run


PEERS: dict[str, tuple[Run, float]] = {
    "HF DynamicCache": (dynamic(padded=False), 1),
    "HF DynamicCache, padded": (dynamic(padded=True), 1),
    "HF StaticCache": (static, 1),
}
OURS: dict[str, tuple[Run, float]] = {
    "learnkv full": (learnkv("full", keep=1), 1),
    f"learnkv SnapKV {KEEP}": (learnkv("snapkv", keep=KEEP), KEEP),
    f"learnkv AdaKV {KEEP}": (learnkv("adakv", keep=KEEP), KEEP),
    f"learnkv AdaKV, {BUDGET} entries": (learnkv("adakv", budget=BUDGET), 0),
}
KVPRESS: dict[str, tuple[Run, float]] = {
    f"kvpress {name} {KEEP}": (kvpress(name), KEEP) for name in ("SnapKV", "AdaKV")
}


@torch.no_grad()
def measure(model: PreTrainedModel, name: str, run: Run, keep: float) -> Row:
    """Per decode step and row of the batch, in units of the prompt's keys and values; `keep` is what a policy keeps."""
    moved, held, made, waits, kernels = [], [], [], [], []
    for length in PROMPTS:
        ids = torch.randint(1, SHAPE.vocabulary, (2, length + 1), generator=torch.Generator().manual_seed(length))
        (few, _), (many, bytes_held) = (run(model, ids, new) for new in NEW)
        steps = NEW[1] - NEW[0]
        moved.append((many.nbytes - few.nbytes) / steps / len(ids))
        made.append((sum(many.storages) - sum(few.storages)) / steps / len(ids))
        held.append(bytes_held / len(ids))
        waits.append((sum(many.waits.values()) - sum(few.waits.values())) / steps)
        kernels.append((many.kernels - few.kernels) / steps)
    at = [float(length * TOKEN) for length in PROMPTS]
    figures = {"moved": slope(at, moved), "allocated": slope(at, made), "held": slope(at, held)}
    rounded = {name: round(figure, 4) + 0.0 for name, figure in figures.items()}
    return {"kernel": "decode step, counted", "impl": name, "keep": keep, **rounded, "waits": max(waits)} | {
        "n_launch": max(kernels),
        "model": SHAPE.name,
        "T": list(PROMPTS),
        "dtype": "float32",
    }


def contenders(only: str | None) -> dict[str, tuple[Run, float]]:
    """Who is measured in this environment."""
    return KVPRESS if only == "kvpress" else PEERS | OURS


def foreign(python: str) -> Iterator[Row]:
    """Rows of kvpress, from its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kvpress.json"
        command = [python, "-m", "benchmarks.cpu_gates", "--only", "kvpress", "--out", str(out)]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.DEVNULL)
        part = json.loads(out.read_text(encoding="utf-8"))
        for row in part["rows"]:
            yield row | {"transformers": part["environment"]["transformers"]}


def table(rows: list[Row]) -> str:
    """Side by side; x is the multiple of the prompt's keys and values."""
    lines = [f"{'':28} {'kept':>6} {'moved x':>8} {'allocated x':>12} {'held x':>7} {'waits':>6} {'operations':>11}"]
    lines += [
        f"{row['impl']:28} {row['keep']:6.2f} {row['moved']:8.3f} {row['allocated']:12.3f} {row['held']:7.3f} "
        f"{row['waits']:6.2f} {row['n_launch']:11.0f}"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    only = {"choices": ["kvpress"], "help": "measure nothing else, in an environment that has it"}
    kvpress_python = {"metavar": "PYTHON", "help": "interpreter of an environment with kvpress, measured too"}
    options = arguments(__doc__, argv, only=only, kvpress=kvpress_python)
    part = Part(options.out, "cpu_gates", dry_run=False)
    model = SHAPE.build(torch.device("cpu"), torch.float32)
    for name, (run, keep) in contenders(options.only).items():
        part.add(**measure(model, name, run, keep))
    for row in foreign(options.kvpress) if options.kvpress else ():
        part.add(**row)
    part.finish()
    print(table(part.rows))
    return part


if __name__ == "__main__":
    main()
