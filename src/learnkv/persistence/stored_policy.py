"""Reading policies from disk: checkpoints of `train.py`, exported folders and YAML files. Never a pickle."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.formats import seal
from learnkv.formats.files import check_size, file_digest, read_json, read_tensors, read_yaml
from learnkv.inference import lora as adapters

FORMAT_VERSION = 1
_BROKEN = (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError)
"""What torch raises for a file that is not a checkpoint, and lookups in a foreign one."""
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
        fault = seal.fault(path)
        checkpoint: dict[str, Any] = {} if fault else _unpickled(path)
    except (pickle.UnpicklingError, *_BROKEN) as error:
        raise _not_a_checkpoint(path, _reason(error)) from None
    if fault:
        raise UserError(f"ckpt={path}: {fault}; expected the file as train.py wrote it")
    try:
        description = _mapping(checkpoint["learnkv"], "its part for learnkv")
        _mapping(description["policy"], "its policy")
        _mapping(description.get("model", {}), "its model")
        _mapping(checkpoint["state_dict"], "its state_dict")
    except _BROKEN as error:
        raise _not_a_checkpoint(path, _reason(error)) from None
    check_size(description, f"ckpt={path}")
    _check_version(description.get("format_version"), path)
    return checkpoint


def _unpickled(path: Path) -> Any:
    """Tensors and plain containers of a file of torch, without torch's advice about foreign pickles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


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
        raise _not_a_checkpoint(path, _reason(error)) from None
    return StoredPolicy(description["policy"], state, description.get("model", {}), adapter)


def stored_in_folder(folder: Path) -> StoredPolicy:
    """The policy of an exported folder.

    Raises:
        UserError: missing, corrupt or foreign files, or another format version. `check_digests` refuses changed ones.
    """
    missing = [name for name in POLICY_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: expected an exported policy, {missing[0]} is missing")
    try:
        manifest = _mapping(read_json(folder / "manifest.json"), "manifest.json")
        model = _mapping(manifest.get("model", {}), "its model")
        _mapping(manifest.get("files", {}), "its files")
        state = read_tensors(folder / "policy.safetensors")
    except (TypeError, UserError) as error:
        raise UserError(f"{folder}: cannot be read: {error}") from None
    _check_version(manifest.get("format_version"), folder)
    adapter = adapters.read(folder / adapters.FOLDER) if manifest.get("adapter") else None
    return StoredPolicy(read_spec(folder / "policy.yaml"), state, model, adapter)


def read_spec(file: Path) -> dict[str, Any]:
    """A policy's constructor arguments from a YAML file. Raises UserError for any other content."""
    spec = read_yaml(file)
    if not isinstance(spec, dict):
        raise UserError(f"{file}: expected a mapping of the policy's arguments, got {type(spec).__name__}")
    return spec


def check_model(stored: StoredPolicy, model: Mapping[str, Any] | None, name: str) -> None:
    """Raise UserError for a policy that was trained for another model."""
    if not stored.model or model is None:
        return
    if stored.model.get("config_hash") != model.get("config_hash"):
        trained_for, given = (
            f"{part.get('id')} (hash {str(part.get('config_hash'))[:12]}; {_listed(part.get('shapes'))})"
            for part in (stored.model, model)
        )
        raise UserError(f"ckpt={name}: trained for {trained_for}, the model is {given}")


def _listed(shapes: Any) -> str:
    """Sizes as text: layers 8, heads 3."""
    return ", ".join(f"{name} {size}" for name, size in shapes.items()) if isinstance(shapes, Mapping) else "no sizes"


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is a {type(value).__name__}, expected a mapping")
    return value


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a policy is loaded from, by their paths in its folder."""
    names = [
        "policy.yaml",
        "policy.safetensors",
        "budgets.csv",
        *(f"{adapters.FOLDER}/{name}" for name in adapters.FILES),
    ]
    return {name: file_digest(folder / name) for name in names if (folder / name).is_file()}


def check_digests(folder: Path) -> None:
    """Raise UserError for files that have changed since the export; older exports have no digests."""
    manifest = read_json(folder / "manifest.json")
    expected = manifest.get("files", {})
    for name, digest in digests_of(folder).items() if expected else ():
        if expected.get(name, digest) != digest:
            raise UserError(f"{folder / name}: has changed since the export, manifest.json has another digest")
    if expected and not isinstance(manifest.get("adapter"), bool):
        raise UserError(f"{folder / 'manifest.json'}: has changed since the export, adapter is not true or false")


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own text recommends to load it without checks
        return "it is broken, or has more than tensors and plain containers"
    return (str(error) or type(error).__name__).splitlines()[0]


def _not_a_checkpoint(path: Path, reason: str) -> UserError:
    return UserError(f"ckpt={path}: not a checkpoint of learnkv's train.py ({reason})")


def _check_version(version: object, path: Path) -> None:
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}")
