"""Model card of an exported policy: `README.md` of its folder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from learnkv.formats.budgets import Table


def model_card(manifest: Mapping[str, Any], spec: Mapping[str, Any], budgets: Table) -> str:
    """Text of the model card.

    Args:
        manifest: content of `manifest.json`.
        spec: the policy's arguments, as `Policy.spec()` gives them.
        budgets: kept fraction [L][H] at each global one.
    """
    lines = [*_introduction(manifest, spec), *_budget_table(manifest, budgets), *_metrics(manifest["metrics"])]
    return "\n".join(lines) + "\n"


def _introduction(manifest: Mapping[str, Any], spec: Mapping[str, Any]) -> Iterator[str]:
    model, shapes = str(manifest["model"]["id"]), manifest["model"]["shapes"]
    is_local = Path(model).is_absolute() or Path(model).exists()
    name = Path(model).name if is_local else model
    source = f"PATH/OF/{name}" if is_local else model
    yield "---"
    yield "library_name: learnkv"
    yield "tags: [kv-cache, kv-cache-compression, custom_generate]"
    if model.count("/") == 1 and not Path(model).exists():  # an id of the hub; others would be dead links there
        yield f"base_model: {model}"
    yield "---"
    yield ""
    yield f"# KV-cache policy for {name}"
    yield ""
    yield (
        f"Chooses the entries of the key-value cache of `{name}` to keep within a budget "
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
    yield f'model, tokenizer = load_model("{source}")'
    yield 'policy = load_policy("PATH")  # this folder, or owner/name on the hub'
    yield "cache = prefill(model, input_ids, policy=policy, keep=0.1)"
    yield "```"
    yield ""
    yield "Or in one line, with learnkv installed; it runs `custom_generate/generate.py` of this folder:"
    yield ""
    yield "```python"
    yield 'model.generate(**inputs, custom_generate="PATH", trust_remote_code=True, keep=0.1, max_new_tokens=100)'
    yield "```"
    yield ""
    yield f"`learnkv eval --ckpt PATH model={source} tasks=niah keep=0.1` compares it with other methods."
    yield ""


def _budget_table(manifest: Mapping[str, Any], budgets: Table) -> Iterator[str]:
    yield "## Budgets"
    yield ""
    how = "the same for every prompt" if manifest["budgets"] == "static" else "mean over the validation prompts"
    yield f"Percentage of its entries that a layer keeps at each global one, {how}; `budgets.csv` has every head."
    yield ""
    yield f"| layer | {' | '.join(f'{100 * keep:g} %' for keep in budgets)} |"
    yield f"| ---: |{' ---: |' * len(budgets)}"
    for layer in range(len(next(iter(budgets.values())))):
        kept = (100 * sum(heads[layer]) / len(heads[layer]) for heads in budgets.values())
        yield f"| {layer} | {' | '.join(f'{share:.1f}' for share in kept)} |"
    yield ""


def _metrics(metrics: Mapping[str, float]) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    if not metrics:
        yield "Nothing was measured when this was exported."
        return
    yield "At the end of the training; `val/…_kl@keep` is the KL divergence to the full cache in nats per token."
    yield ""
    yield "| metric | value |"
    yield "| --- | ---: |"
    for name, value in sorted(metrics.items()):
        yield f"| {name} | {value:.4g} |"


def _named(component: Mapping[str, Any] | None) -> str:
    """Names of a component and of its base components, from the outside in."""
    if component is None:
        return "none"
    name = str(component["class_path"]).rpartition(".")[2]
    base = component.get("init_args", {}).get("base")
    return name if base is None else f"{name} on {_named(base)}"
