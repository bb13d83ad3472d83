"""LoRA adapters that act on tokens read from what a policy retained; prompts and full caches are read without them."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learnkv.core.adapter import PREFIX, Adapter
from learnkv.errors import UserError

FOLDER = "adapter"
"""Of an exported policy; peft reads it, too."""
_OUTSIDE = "base_model.model."  # what peft puts before the names of weights on disk


def follow_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model: of our adapters the one acts that the cache names, and is loaded if it is new."""
    wanted: Adapter | None = getattr(kwargs.get("past_key_values"), "adapter", None)
    if wanted is not None:
        load(model, wanted)
    if any(name.startswith(PREFIX) for name in getattr(model, "peft_config", ())):
        _activate(model, None if wanted is None else wanted.name)


def add(model: Any, adapter: Adapter) -> None:
    """Give the model a new adapter, which changes nothing yet. Its weights are float32 whatever the model's are.

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
    """Give the model an adapter with its weights, frozen; nothing where it has it.

    Raises:
        UserError: for an adapter of another model.
    """
    if adapter.name in getattr(model, "peft_config", ()):
        return
    if not adapter.state:
        raise UserError("the policy is trained beside an adapter that this model does not have")
    add(model, adapter)
    own = weights(model, adapter)
    want, have = ({key: tuple(held.shape) for key, held in one.items()} for one in (own, adapter.state))
    if want != have:
        _remove(model, adapter.name)
        key = next(key for key in sorted({*want, *have}) if want.get(key) != have.get(key))
        raise UserError(f"adapter: {key} has the shape {have.get(key)}, the model asks for {want.get(key)}")
    for key, weight in own.items():
        weight.data.copy_(adapter.state[key])
        weight.requires_grad_(False)


def weights(model: nn.Module, adapter: Adapter) -> dict[str, nn.Parameter]:
    """The adapter's parameters in the model, by peft's names."""
    return {
        _outside(name, adapter.name): weight for name, weight in model.named_parameters() if f".{adapter.name}." in name
    }


def held(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the weights that the model has for it now."""
    state = {key: weight.detach().cpu().clone() for key, weight in weights(model, adapter).items()}
    return Adapter(adapter.rank, adapter.alpha, adapter.targets, state)


def ours(name: str) -> bool:
    """Whether a name in a state dict is that of a weight of an adapter of ours."""
    return f".{PREFIX}" in name


def in_training(name: str) -> bool:
    """Whether a name in a state dict is that of a weight of the adapter in training."""
    return f".{PREFIX}." in name


def from_checkpoint(told: Mapping[str, Any], state: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a checkpoint whose state dict has the model's weights below `model.`."""
    found = {_outside(name.removeprefix("model."), PREFIX): one for name, one in state.items() if in_training(name)}
    return Adapter(int(told["rank"]), float(told["alpha"]), tuple(told["targets"]), found)


def told(adapter: Adapter) -> dict[str, Any]:
    """All but the weights, as plain values."""
    return {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets)}


def write(adapter: Adapter, folder: Path) -> None:
    """An adapter as peft stores it: `adapter_config.json` and `adapter_model.safetensors`."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: one.contiguous() for key, one in adapter.state.items()}, folder / "adapter_model.safetensors")
    LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted(adapter.targets),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(folder))


def read(folder: Path) -> Adapter:
    """What `write` wrote. Raises UserError for what is missing or is no such adapter."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        rank, alpha, targets = int(config["r"]), float(config["lora_alpha"]), _names(config["target_modules"])
        return Adapter(rank, alpha, targets, load_file(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: expected a LoRA adapter ({str(error).splitlines()[0]})") from None


def _names(targets: Sequence[str] | str) -> tuple[str, ...]:
    return (targets,) if isinstance(targets, str) else tuple(sorted(targets))


def _outside(name: str, adapter: str) -> str:
    return _OUTSIDE + name.replace(f".{adapter}.", ".")


def _activate(model: nn.Module, name: str | None) -> None:
    """Let `name` act and no other adapter of ours; what trains stays what it is, which peft would change."""
    for layer in _adapted(model):
        active = [one for one in layer.active_adapters if not one.startswith(PREFIX)]
        active += [] if name is None else [name]
        if active != list(layer.active_adapters):
            trains = [(weight, weight.requires_grad) for weight in layer.parameters()]
            layer.set_adapter(active)
            for weight, did in trains:
                weight.requires_grad_(did)


def _remove(model: Any, name: str) -> None:
    for layer in _adapted(model):
        layer.delete_adapter(name)
    getattr(model, "peft_config", {}).pop(name, None)


def _adapted(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
