"""kvpress's side of the comparison: the same weights and prompts through its presses, answers left in files.

`python -m experiments.kvpress_comparison.peer FOLDER` in an environment of its own: kvpress 0.5.5 needs an older
transformers than learnkv, which is not imported here. FOLDER has `request.json` and models; `kept.npz` and
`answer.json` are written.
"""

import copy
import json
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache


@torch.no_grad()
def main(folder: Path) -> None:
    """Answer the request in `folder` with kvpress."""
    torch.set_num_threads(1)
    request = json.loads((folder / "request.json").read_text())
    kept: dict[str, Any] = {}
    rows = []
    model = load(folder / "model")
    for at, prompt in enumerate(request["prompts"]):
        full = read(model, prompt["read"], None)
        whole = [layer.keys[0].clone() for layer in full.layers]
        wanted, said = answer(model, full, prompt)
        rows.append({"prompt": at, "method": "none", "keep": 1.0, "said": said, "kl": 0.0, "bytes": held(model, full)})
        for name, spec in request["methods"].items():
            for keep in request["keeps"]:
                cache = read(model, prompt["read"], press(spec, 1 - keep))
                size, found = held(model, cache), retained(model, cache, whole)
                logits, said = answer(model, cache, prompt)
                kl = float((wanted.exp() * (wanted - logits)).sum(-1).mean())
                rows.append({"prompt": at, "method": name, "keep": keep, "said": said, "kl": kl, "bytes": size})
                kept[f"{name} {keep:g} {at}"] = np.packbits(found, axis=-1)
        print(f"prompt {at + 1} of {len(request['prompts'])}", flush=True)
    steps = {}
    model, long = load(folder / "long"), request["long"]
    for name, spec in {"none": None, **request["methods"]}.items():
        cache = read(model, long["read"], None if spec is None else press(spec, 1 - long["keep"]))
        size = held(model, cache)
        steps[name] = {"bytes": size, "ms": step_ms(model, cache, len(long["read"]), long["steps"])}
        print(f"{name}: {steps[name]}", flush=True)
    np.savez_compressed(folder / "kept.npz", **kept)
    versions = {package: version(package) for package in ("kvpress", "transformers", "torch")}
    (folder / "answer.json").write_text(json.dumps({"versions": versions, "rows": rows, "steps": steps}))


def load(folder: Path) -> PreTrainedModel:
    """The model of the request, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def press(spec: dict[str, Any], ratio: float) -> Any:
    """The press that a request describes; one around another has the inner one as `press`."""
    arguments = dict(spec["arguments"])
    if "press" in arguments:
        return getattr(kvpress, spec["press"])(**arguments | {"press": press(arguments["press"], ratio)})
    return getattr(kvpress, spec["press"])(compression_ratio=ratio, **arguments)


def read(model: PreTrainedModel, ids: list[int], how: Any) -> DynamicCache:
    """Read a prompt under a press."""
    for module in model.modules():
        if hasattr(module, "masked_key_indices"):
            module.masked_key_indices = None
    cache = DynamicCache()
    with how(model) if how is not None else nullcontext():
        model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    return cache


def step(model: PreTrainedModel, token: int, cache: DynamicCache, position: int) -> Tensor:
    """Logits [V] after one token: several at once leak attention to the keys that AdaKV masks."""
    ids, where = torch.tensor([[token]]), torch.tensor([[position]])
    logits: Tensor = model(input_ids=ids, position_ids=where, past_key_values=cache).logits
    return logits[0, -1]


def answer(model: PreTrainedModel, cache: DynamicCache, prompt: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """Log-probabilities [T, V] along the question and a given answer, and what is said greedily instead of it."""
    position = len(prompt["read"])
    logits = [step(model, token, cache, position + at) for at, token in enumerate(prompt["then"])]
    position += len(prompt["then"])
    mine, said = copy.deepcopy(cache), [int(logits[-1].argmax())]
    while len(said) < prompt["new"] and said[-1] not in prompt["ends"]:
        said.append(int(step(model, said[-1], mine, position + len(said) - 1).argmax()))
    logits += [step(model, token, cache, position + at) for at, token in enumerate(prompt["answer"][:-1])]
    return torch.stack(logits).log_softmax(-1), said


def retained(model: PreTrainedModel, cache: DynamicCache, whole: list[Tensor]) -> np.ndarray:
    """[L, H, S] which entries of the prompt are kept: those whose keys are still there and not masked."""
    found = np.zeros((len(whole), *whole[0].shape[:2]), dtype=bool)
    for at, (layer, keys) in enumerate(zip(cache.layers, whole, strict=True)):
        masked = getattr(model.model.layers[at].self_attn, "masked_key_indices", None)
        for head in range(keys.shape[0]):
            places = {key.numpy().tobytes(): slot for slot, key in enumerate(keys[head])}
            found[at, head, [places[key.numpy().tobytes()] for key in layer.keys[0, head]]] = True
        if masked is not None:
            found[at, masked[1].numpy(), masked[2].numpy()] = False
    return found


def held(model: PreTrainedModel, cache: DynamicCache) -> int:
    """Bytes of keys, values and of the indices of what counts as evicted."""
    tensors = [one for layer in cache.layers for one in (layer.keys, layer.values)]
    for module in model.modules():
        tensors += [one for one in getattr(module, "masked_key_indices", None) or () if isinstance(one, Tensor)]
    return sum(one.nbytes for one in tensors)


def step_ms(model: PreTrainedModel, cache: DynamicCache, position: int, steps: int) -> float:
    """Milliseconds of CPU time per decode step: the median."""
    spent = []
    for at in range(2 + steps):
        begin = time.process_time()
        step(model, 1, cache, position + at)
        spent.append(1e3 * (time.process_time() - begin))
    return sorted(spent[2:])[steps // 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
