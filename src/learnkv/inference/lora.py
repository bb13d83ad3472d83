"""LoRA adapters for tokens that are read from a compressed cache; prompts and full caches are read without them."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from learnkv.core.adapter import PREFIX, Adapter
from learnkv.errors import UserError
from learnkv.formats.files import read_json, read_tensors

FOLDER = "adapter"
"""Folder of the adapter in an exported policy; peft reads it, too."""
FILES = ("adapter_config.json", "adapter_model.safetensors")
_PEFT_PREFIX = "base_model.model."  # of the names of weights on disk


def follow_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model: activate the cache's adapter and no other of learnkv's; load it if it is new."""
    wanted: Adapter | None = getattr(kwargs.get("past_key_values"), "adapter", None)
    if wanted is not None:
        load(model, wanted)
    if any(name.startswith(PREFIX) for name in getattr(model, "peft_config", ())):
        _activate(model, None if wanted is None else wanted.name)


def add(model: Any, adapter: Adapter) -> None:
    """Add a new adapter, which changes no output yet, to the model. Its weights are float32 whatever the model's are.

    Raises:
        UserError: for targets that the model does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.targets), bias="none")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multiple adapters in the model.*")
            inject_adapter_in_model(config, model, adapter.name)
    except ValueError as error:
        _remove(model, adapter.name)
        reason = str(error).splitlines()[0]
        raise UserError(f"lora: targets={','.join(adapter.targets)} do not fit the model ({reason})") from None
    for weight in weights(model, adapter).values():
        weight.data = weight.data.float()
    _activate(model, None)


def load(model: Any, adapter: Adapter) -> None:
    """Add an adapter with its weights, frozen; does nothing where the model has it.

    Raises:
        UserError: for an adapter of another model.
    """
    if adapter.name in getattr(model, "peft_config", ()):
        return
    if not adapter.state:
        raise UserError("the policy is trained beside an adapter that this model does not have")
    add(model, adapter)
    parameters = weights(model, adapter)
    expected, got = (
        {key: tuple(tensor.shape) for key, tensor in state.items()} for state in (parameters, adapter.state)
    )
    if expected != got:
        _remove(model, adapter.name)
        key = next(key for key in sorted({*expected, *got}) if expected.get(key) != got.get(key))
        raise UserError(f"adapter: {key} has the shape {got.get(key)}, the model expects {expected.get(key)}")
    for key, weight in parameters.items():
        weight.data.copy_(adapter.state[key])
        weight.requires_grad_(False)


def weights(model: nn.Module, adapter: Adapter) -> dict[str, nn.Parameter]:
    """The adapter's parameters in the model, by peft's names."""
    return {
        _peft_name(name, adapter.name): weight
        for name, weight in model.named_parameters()
        if f".{adapter.name}." in name
    }


def current_weights(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with its present weights in the model."""
    state = {key: weight.detach().cpu().clone() for key, weight in weights(model, adapter).items()}
    return Adapter(adapter.rank, adapter.alpha, adapter.targets, state)


def is_adapter_weight(name: str) -> bool:
    """Whether a name in a state dict is that of a weight of one of learnkv's adapters."""
    return f".{PREFIX}" in name


def in_training(name: str) -> bool:
    """Whether a name in a state dict is that of a weight of the adapter in training."""
    return f".{PREFIX}." in name


def from_checkpoint(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a checkpoint whose state dict has the model's weights below `model.`."""
    weights = {
        _peft_name(name.removeprefix("model."), PREFIX): weight for name, weight in state.items() if in_training(name)
    }
    return of_its_rank(
        Adapter(int(description["rank"]), float(description["alpha"]), tuple(description["targets"]), weights)
    )


def description(adapter: Adapter) -> dict[str, Any]:
    """All but the weights, as plain values."""
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets)}


def write(adapter: Adapter, folder: Path) -> None:
    """Store an adapter as peft does: `adapter_config.json` and `adapter_model.safetensors`."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: weight.contiguous() for key, weight in adapter.state.items()}, folder / "adapter_model.safetensors")
    LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(adapter.targets),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))


def read(folder: Path) -> Adapter:
    """Read what `write` stored. Raises UserError for missing or other files."""
    try:
        config = read_json(folder / "adapter_config.json")
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), _names(config["target_modules"])
        return of_its_rank(Adapter(rank, alpha, targets, read_tensors(folder / "adapter_model.safetensors")))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: expected a LoRA adapter ({str(error).splitlines()[0]})") from None


def of_its_rank(adapter: Adapter) -> Adapter:
    """The adapter; ValueError for matrices of another rank, of which a model would allocate as much as is asked for."""
    rows = {len(weight) for name, weight in adapter.state.items() if ".lora_A." in name}
    if rows != {adapter.rank}:
        raise ValueError(f"rank {adapter.rank}, its matrices have {sorted(rows)}")
    return adapter


def _names(targets: Sequence[str] | str) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(sorted(targets))


def _peft_name(name: str, adapter: str) -> str:
    return _PEFT_PREFIX + name.replace(f".{adapter}.", ".")


def _activate(model: nn.Module, name: str | None) -> None:
    """Activate `name` and no other of learnkv's adapters; `requires_grad`, which peft would change, stays as it is."""
    for layer in _adapted(model):
        active = [other for other in layer.active_adapters if not other.startswith(PREFIX)]
        active += [] if name is None else [name]
        if active != list(layer.active_adapters):
            trained = [(weight, weight.requires_grad) for weight in layer.parameters()]
            layer.set_adapter(active)
            for weight, requires_grad in trained:
                weight.requires_grad_(requires_grad)


def _remove(model: Any, name: str) -> None:
    for layer in _adapted(model):
        layer.delete_adapter(name)
    getattr(model, "peft_config", {}).pop(name, None)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of peft's layers around another layer."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def own_settings(layer: Any) -> list[tuple[str, Any]]:
    """What a layer of peft computes with besides its tensors; empty where all adapters are learnkv's."""
    stores = [getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name)]
    own = sorted({str(adapter) for store in stores for adapter in store if not str(adapter).startswith(PREFIX)})
    if not own:
        return []
    by_adapter = {name: value for name, value in vars(layer).items() if isinstance(value, dict)}
    numbers = [
        (name, adapter, value[adapter])
        for name, value in sorted(by_adapter.items())
        for adapter in own
        if isinstance(value.get(adapter), bool | int | float | str)
    ]
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in own]
    return [("adapters", own), ("active", active), ("numbers", numbers)]


def _adapted(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
