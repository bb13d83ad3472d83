"""The page that an exported policy introduces itself with: `README.md` of its folder, the model card on a hub."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from learnkv.formats.budgets import Table


def card(manifest: Mapping[str, Any], spec: Mapping[str, Any], budgets: Table) -> str:
    """Text of the page.

    Args:
        manifest: of the folder.
        spec: the policy's arguments, as `Policy.spec()` gives them.
        budgets: kept fraction [L][H] at each global one.
    """
    return "\n".join(_lines(manifest, spec, budgets)) + "\n"


def _lines(manifest: Mapping[str, Any], spec: Mapping[str, Any], budgets: Table) -> Iterator[str]:
    model, shapes = str(manifest["model"]["id"]), manifest["model"]["shapes"]
    named = Path(model).name if Path(model).is_absolute() else model
    yield "---"
    yield "library_name: learnkv"
    yield "tags: [kv-cache, kv-cache-compression]"
    if model.count("/") == 1 and not Path(model).exists():  # an id of the hub; others would be dead links there
        yield f"base_model: {model}"
    yield "---"
    yield ""
    yield f"# KV-cache policy for {named}"
    yield ""
    yield (
        f"Says which entries of the key-value cache of `{named}` to keep when a prompt is cut to a budget "
        f"({shapes['layers']} layers of {shapes['heads']} kv heads). The language model itself is unchanged."
    )
    yield ""
    yield f"- scores: {_named(spec.get('scorer'))}"
    yield f"- budgets: {_named(spec.get('allocator'))}"
    yield f"- always kept: the first {spec['sinks']} and the last {spec['recent']} tokens, within the budget"
    if manifest["adapter"]:
        yield "- a LoRA adapter (`adapter/`) that acts on tokens read from the compressed cache"
    yield ""
    yield "```python"
    yield "from learnkv import load_model, load_policy, prefill"
    yield ""
    yield f'model, tokenizer = load_model("{named}")'
    yield 'policy = load_policy("PATH")  # this folder, or owner/name on the hub'
    yield "cache = prefill(model, input_ids, policy=policy, keep=0.1)"
    yield "```"
    yield ""
    yield f"`learnkv eval --ckpt PATH model={named} tasks=niah keep=0.1` compares it with other methods."
    yield ""
    yield "## Budgets"
    yield ""
    how = "the same for every prompt" if manifest["budgets"] == "static" else "mean over the validation prompts"
    yield f"Percentage of its entries that a layer keeps at each global one, {how}; `budgets.csv` has every head."
    yield ""
    yield f"| layer | {' | '.join(f'{100 * keep:g} %' for keep in budgets)} |"
    yield f"| ---: |{' ---: |' * len(budgets)}"
    for layer in range(len(next(iter(budgets.values())))):
        kept = (100 * sum(heads[layer]) / len(heads[layer]) for heads in budgets.values())
        yield f"| {layer} | {' | '.join(f'{one:.1f}' for one in kept)} |"
    yield ""
    yield "## Measured"
    yield ""
    if not (metrics := manifest["metrics"]):
        yield "Nothing was measured when this was exported."
        return
    yield "By the training run, at its end; `val/…_kl@keep` is the KL divergence to the full cache in nats per token."
    yield ""
    yield "| figure | value |"
    yield "| --- | ---: |"
    for name, value in sorted(metrics.items()):
        yield f"| {name} | {value:.4g} |"


def _named(component: Mapping[str, Any] | None) -> str:
    """Names of a component and of what it builds on, from the outside in."""
    if component is None:
        return "none"
    name = str(component["class_path"]).rpartition(".")[2]
    base = component.get("init_args", {}).get("base")
    return name if base is None else f"{name} on {_named(base)}"
