"""kvpress's AdaKV and SnapKV: time, bytes moved, bytes held and waits of a decode step.

`python -m benchmarks.peers.kvpress_adakv --out parts/kvpress.json` in an environment of its own: kvpress 0.5.5 needs an
older transformers than learnkv, which is not imported here.
"""

import time
from typing import Any

import torch
from kvpress import AdaKVPress, SnapKVPress
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from benchmarks.meters import Meter
from benchmarks.results import Clock, Part, arguments, device
from benchmarks.shapes import LLAMA_8B, Shape
from benchmarks.timing import Timing, one_line

RATIO = 0.9
"""Part of the prompt's entries that is removed."""

PRESSES = {"none": None, "SnapKV": lambda: SnapKVPress(RATIO), "AdaKV": lambda: AdaKVPress(SnapKVPress(RATIO))}


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    where = device(options.dry_run)
    part = Part(options.out, "kvpress", options.dry_run)
    clock = Clock(options.seconds)
    shape, prompts = (LLAMA_8B.tiny(), ((2, 128),)) if options.dry_run else (LLAMA_8B, ((1, 32768), (4, 32768)))
    model = shape.build(where)
    for batch, prompt in prompts:
        for name in PRESSES:
            if clock.over():
                return part
            measure(part, model, shape, name, batch, prompt)
    part.finish()
    return part


@torch.no_grad()
def measure(part: Part, model: PreTrainedModel, shape: Shape, name: str, batch: int, prompt: int) -> None:
    """Read a prompt of random tokens under a press, then decode."""
    about: dict[str, Any] = {
        "kernel": "kvpress step",
        "impl": f"kvpress {name}",
        "model": shape.name,
        "B": batch,
        "T": prompt,
    }
    about |= {"budget": prompt if name == "none" else round((1 - RATIO) * prompt), "dtype": "bfloat16"}
    try:
        ids = torch.randint(1, shape.vocabulary, (batch, prompt), device=model.device)
        cache = DynamicCache()
        make = PRESSES[name]
        if make is None:
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        else:
            with make()(model):
                model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
        spent = []
        for at in range(4 + 2 * 8):
            _synchronize()
            begin = time.perf_counter()
            _step(model, token, cache, prompt + at)
            _synchronize()
            spent.append(1e6 * (time.perf_counter() - begin))
        with Meter() as counts:
            _step(model, token, cache, prompt + len(spent))
        turns = [sorted(spent[at : at + 8])[4] for at in (4, 12)]
        timing: Timing | str = Timing(turns[0], turns[1], "host")
        measured: dict[str, Any] = {
            "moved": counts.nbytes,
            "waits": sum(counts.waits.values()),
            "cache_bytes": _held(model, cache),
        }
    except Exception as error:
        timing, measured = one_line(error), {}
    part.add(timing, **about, **measured)
    for module in model.modules():
        if hasattr(module, "masked_key_indices"):
            module.masked_key_indices = None


def _step(model: PreTrainedModel, token: torch.Tensor, cache: DynamicCache, position: int) -> None:
    """One token of every row, at its position in the prompt as it was."""
    model(input_ids=token, position_ids=torch.full_like(token, position), past_key_values=cache)


def _held(model: PreTrainedModel, cache: DynamicCache) -> int:
    """Bytes of keys, values and of the indices of what counts as evicted."""
    tensors = [held for layer in cache.layers for held in (layer.keys, layer.values)]
    for module in model.modules():
        tensors += [one for one in getattr(module, "masked_key_indices", None) or () if isinstance(one, torch.Tensor)]
    return sum(held.nbytes for held in tensors)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
