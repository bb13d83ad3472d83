"""kvpress's SnapKV and ours in turns, on a CPU: a prompt read and compressed to a tenth, then decode steps.

`python -m benchmarks.peers.kvpress_prefill --out FILE` in an environment with kvpress and learnkv, whose transformers
is older. Both get the same weights, window and pooling. kvpress leaves a default cache of transformers with fewer
entries: its steps are the shortest loop there is around the model, ours are `learnkv.generate`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from kvpress import SnapKVPress
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from benchmarks.cpu_decode import in_turns, interval, median, ratios
from benchmarks.results import Part, arguments
from benchmarks.shapes import LLAMA_8B
from learnkv import Policy, attach, generate, prefill
from learnkv.scorers import SnapKV

SHAPE = dataclasses.replace(
    LLAMA_8B, name="8 layers", layers=8, hidden=512, ffn=1024, heads=8, kv_heads=2, dim=64, vocabulary=1000
)
KEEP, WINDOW, KERNEL, NEW = 0.1, 32, 7, 16
THEIRS, OURS = "kvpress SnapKV", "learnkv SnapKV"


@torch.no_grad()
def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv, pairs={"type": int, "default": 20}, threads={"type": int, "default": 1})
    torch.set_num_threads(options.threads)
    part = Part(options.out, "kvpress_prefill", options.dry_run)
    plain, attached = (SHAPE.build(torch.device("cpu"), torch.float32) for _ in range(2))
    attach(attached)
    for prompt in (256,) if options.dry_run else (1024, 4096):
        ids = torch.randint(1, SHAPE.vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
        reading: dict[str, Callable[[], Any]] = {
            THEIRS: lambda ids=ids: pressed(plain, ids),  # type: ignore[misc]
            OURS: lambda ids=ids: compressed(attached, ids),  # type: ignore[misc]
        }
        steps = {THEIRS: steps_of(plain, pressed(plain, ids), prompt), OURS: generating(attached, ids)}
        for kernel, turns, per in (("read and compress", reading, 1), ("decode step", steps, NEW)):
            spent = in_turns(turns, options.pairs)
            for name, seconds in spent.items():
                row: dict[str, Any] = {f"{kind}_ms": 1e3 * median(seconds, kind) / per for kind in ("cpu", "wall")}
                for kind in () if name == THEIRS else ("cpu", "wall"):
                    row[f"{kind}_ratio_kvpress"] = interval(ratios(seconds, spent[THEIRS], kind))
                part.add(kernel=kernel, impl=name, model=SHAPE.name, B=1, T=prompt, keep=KEEP, **row)
    part.finish()
    return part


def pressed(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """What kvpress leaves of a prompt."""
    cache = DynamicCache()
    with SnapKVPress(compression_ratio=1 - KEEP, window_size=WINDOW, kernel_size=KERNEL)(model):
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return cache


def compressed(model: PreTrainedModel, ids: Tensor) -> Any:
    """What our SnapKV leaves of a prompt."""
    return prefill(model, ids, policy=Policy(SnapKV(window=WINDOW, kernel_size=KERNEL)), keep=KEEP)


def steps_of(model: PreTrainedModel, cache: DynamicCache, prompt: int) -> Callable[[], None]:
    """Decode steps after a compressed prompt of transformers' cache, at the positions of the prompt as it was."""
    kept = cache.get_seq_length()

    def turn() -> None:
        token = torch.ones(1, 1, dtype=torch.long)
        for step in range(NEW):
            position = torch.full_like(token, prompt + step)
            token = model(input_ids=token, position_ids=position, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.crop(kept)

    return turn


def generating(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Decode steps of ours."""
    cache, question = compressed(model, ids), torch.ones(1, 1, dtype=torch.long)

    def turn() -> None:
        if cache.tail_length:
            cache.crop(-cache.tail_length)
        generate(model, question, cache, max_new_tokens=NEW, do_sample=False, eos_token_id=[])

    return turn


if __name__ == "__main__":
    main()
