"""Reading policies from disk: checkpoints of `train.py`, exported folders and YAML files. Never a pickle."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.formats.files import read_json, read_text
from learnkv.inference import lora as adapters

FORMAT_VERSION = 1
POLICY_FILES = ("policy.yaml", "policy.safetensors", "manifest.json")


class StoredPolicy(NamedTuple):
    """A policy's constructor arguments and its weights."""

    spec: dict[str, Any]
    """Constructor arguments, as `Policy.spec()` gives them."""
    state: dict[str, Tensor]
    """State dict; empty for a heuristic."""
    model: dict[str, Any] | None = None
    """Description of the model that the policy was trained for."""
    adapter: Adapter | None = None
    """LoRA adapter that was trained beside it."""


def load_checkpoint(file: str | Path) -> dict[str, Any]:
    """A checkpoint of `train.py` as plain containers and tensors; its `learnkv` part describes policy and model.

    Raises:
        UserError: missing, corrupt or foreign file, or another format version.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"ckpt={path}: no such file")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        description = _mapping(checkpoint["learnkv"], "its part for learnkv")
        _mapping(description["policy"], "its policy")
        _mapping(description.get("model", {}), "its model")
        _mapping(checkpoint["state_dict"], "its state_dict")
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise _not_a_checkpoint(path, error) from None
    _check_version(description.get("format_version"), path)
    return checkpoint


def stored_in_checkpoint(path: Path) -> StoredPolicy:
    """The policy of a checkpoint. Raises UserError as `load_checkpoint` does."""
    checkpoint = load_checkpoint(path)
    description, state_dict = checkpoint["learnkv"], checkpoint["state_dict"]
    prefix = "policy."
    state = {name.removeprefix(prefix): weight for name, weight in state_dict.items() if name.startswith(prefix)}
    settings = description.get("adapter")
    try:
        adapter = settings and adapters.from_checkpoint(settings, state_dict)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _not_a_checkpoint(path, error) from None
    return StoredPolicy(description["policy"], state, description.get("model", {}), adapter)


def stored_in_folder(folder: Path) -> StoredPolicy:
    """The policy of an exported folder.

    Raises:
        UserError: missing, corrupt or foreign files, or another format version.
    """
    missing = [name for name in POLICY_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: expected an exported policy, {missing[0]} is missing")
    try:
        manifest = _mapping(read_json(folder / "manifest.json"), "manifest.json")
        model = _mapping(manifest.get("model", {}), "its model")
        state = load_file(folder / "policy.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read: {str(error).splitlines()[0]}") from None
    _check_version(manifest.get("format_version"), folder)
    adapter = adapters.read(folder / adapters.FOLDER) if manifest.get("adapter") else None
    return StoredPolicy(read_spec(folder / "policy.yaml"), state, model, adapter)


def read_spec(file: Path) -> dict[str, Any]:
    """A policy's constructor arguments from a YAML file. Raises UserError for any other content."""
    try:
        spec = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    if not isinstance(spec, dict):
        raise UserError(f"{file}: expected a mapping of the policy's arguments, got {type(spec).__name__}")
    return spec


def check_model(stored: StoredPolicy, model: Mapping[str, Any] | None, name: str) -> None:
    """Raise UserError for a policy that was trained for another model."""
    if not stored.model or model is None:
        return
    if stored.model.get("config_hash") != model.get("config_hash"):
        trained_for, given = (
            f"{part.get('id')} (hash {str(part.get('config_hash'))[:12]}, {part.get('shapes')})"
            for part in (stored.model, model)
        )
        raise UserError(f"ckpt={name}: trained for {trained_for}, the model is {given}")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is a {type(value).__name__}, expected a mapping")
    return value


def _not_a_checkpoint(path: Path, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"ckpt={path}: not a checkpoint of learnkv's train.py ({reason})")


def _check_version(version: object, path: Path) -> None:
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
