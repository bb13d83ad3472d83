"""Policies on disk: heuristics as YAML, trained ones as checkpoints or exported folders. Never a pickle."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.formats import budgets as budget_table
from learnkv.inference import lora as adapters
from learnkv.ops.round_to_budget import round_to_budget
from learnkv.persistence import hub
from learnkv.persistence.model_card import card
from learnkv.persistence.named_configs import find_config
from learnkv.policy.policy import Policy

FORMAT_VERSION = 1
GRID = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
"""Kept fractions at which an export tabulates budgets."""
SHIPPED = Path(__file__).resolve().parents[1] / "reference" / "policy"
_NOMINAL_ENTRIES = 4096
_Read = tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], Adapter | None]
"""A policy's arguments, its weights, the model it was trained for, and the adapter that was trained beside it."""


def build_policy(spec: Mapping[str, Any], allow: Sequence[str] = (), where: str = "policy") -> Policy:
    """A policy from the mapping of its constructor's arguments.

    Args:
        spec: as `Policy.spec()` gives it, or as a YAML of `configs/policies` holds it.
        allow: module prefixes besides `learnkv` whose classes may be named.
        where: what to call the mapping in an error.

    Raises:
        UserError: a class that is not allowed, an unknown argument, a value of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    _check_classes(spec, ("learnkv", *allow), where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Policy, "policy")
    try:
        parsed = parser.parse_object({"policy": dict(spec)})
        policy = parser.instantiate(parsed)["policy"]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_one_line(str(error))}") from None
    assert isinstance(policy, Policy)
    return policy


def _one_line(message: str) -> str:
    """What jsonargparse has to say, without the alternatives that were not meant."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))


def _check_classes(node: Any, allowed: Sequence[str], where: str) -> None:
    if isinstance(node, Mapping):
        path = node.get("class_path")
        if path is not None and not any(str(path).startswith(prefix + ".") or path == prefix for prefix in allowed):
            raise UserError(
                f"{where}: names the class {path}; only learnkv's own are built unless allow={str(path).split('.')[0]}"
            )
        for child in node.values():
            _check_classes(child, allowed, where)
    elif isinstance(node, list | tuple):
        for child in node:
            _check_classes(child, allowed, where)


def load_policy(path: str | Path, allow: Sequence[str] = (), model: Mapping[str, Any] | None = None) -> Policy:
    """A policy from a Lightning checkpoint, an exported folder, a training run's folder, or a heuristic's YAML.

    Args:
        path: file or folder; a bare name finds `configs/policies/NAME.yaml`; `reference` is the shipped policy;
            `owner/name` or `owner/name@revision`, where there is no such path, a policy on the Hugging Face hub.
        allow: module prefixes besides `learnkv` whose classes the file may name.
        model: description of the model it will serve (`describe_model`); a policy trained for another one is refused.

    Raises:
        UserError: missing, corrupt or foreign file.
    """
    where = Path(path).expanduser()
    if (folder := policy_folder(path)) is not None:
        spec, state, trained_for, adapter = _read_folder(folder)
    elif where.suffix == ".ckpt":
        spec, state, trained_for, adapter = _read_checkpoint(where)
    else:
        file = find_config("policies", str(path), "ckpt")
        spec, state, trained_for, adapter = _read_yaml(file), {}, None, None
    policy = build_policy(spec, allow, str(path))
    policy.adapter = adapter
    _check_model(trained_for, model, str(path))
    return _with_weights(policy, state, str(path))


def policy_folder(path: str | Path) -> Path | None:
    """The folder of a trained policy that `path` means (its own, a run's, the shipped one, one fetched from the hub),
    None for a file."""
    where = Path(path).expanduser()
    if str(path) == "reference" and not where.exists():
        return SHIPPED
    if hub.names_a_repository(str(path)):
        return hub.fetch(str(path))
    if not where.is_dir():
        return None
    of_run = not (where / "policy.yaml").exists() and (where / "policy" / "policy.yaml").exists()
    return where / "policy" if of_run else where


def describe_policy_file(path: str | Path) -> str:
    """The name a policy goes by in tables: a heuristic's file name, `learned` or `learned-RUN` for a trained one."""
    where = Path(path).expanduser()
    if str(path) == "reference" and not where.exists():
        return "learned"
    if hub.names_a_repository(str(path)):
        name = str(path).partition("@")[0].rpartition("/")[2]
    elif where.suffix != ".ckpt" and not where.is_dir():
        return where.stem
    else:
        folder = where.resolve()
        run = folder.parent.parent if where.suffix == ".ckpt" else folder.parent if folder.name == "policy" else folder
        name = run.name
    return name if name.startswith("learned") else f"learned-{name}"


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    if not isinstance(spec, dict):
        raise UserError(f"{file}: expected a mapping of the policy's arguments, got {type(spec).__name__}")
    return spec


def _read_folder(folder: Path) -> _Read:
    missing = [name for name in ("policy.yaml", "policy.safetensors", "manifest.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: expected an exported policy, {missing[0]} is missing")
    try:
        manifest = _mapping(json.loads((folder / "manifest.json").read_text(encoding="utf-8")), "manifest.json")
        trained_for = _mapping(manifest.get("model", {}), "its model")
        state = load_file(folder / "policy.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read: {str(error).splitlines()[0]}") from None
    _check_version(manifest.get("format_version"), folder)
    adapter = adapters.read(folder / adapters.FOLDER) if manifest.get("adapter") else None
    return _read_yaml(folder / "policy.yaml"), state, trained_for, adapter


def _mapping(held: Any, what: str) -> dict[str, Any]:
    if not isinstance(held, dict):
        raise TypeError(f"{what} is a {type(held).__name__}, expected a mapping")
    return held


def _read_checkpoint(file: Path) -> _Read:
    if not file.is_file():
        raise UserError(f"ckpt={file}: no such file")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        ours = _mapping(checkpoint["learnkv"], "its part for learnkv")
        spec, trained_for = _mapping(ours["policy"], "its policy"), _mapping(ours.get("model", {}), "its model")
        state = {
            name.removeprefix("policy."): held
            for name, held in checkpoint["state_dict"].items()
            if name.startswith("policy.")
        }
        beside = ours.get("adapter")
        adapter = beside and adapters.from_checkpoint(beside, checkpoint["state_dict"])
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"ckpt={file}: not a checkpoint of learnkv's train.py ({reason})") from None
    _check_version(ours.get("format_version"), file)
    return spec, state, trained_for, adapter


def _check_version(version: object, where: Path) -> None:
    if version != FORMAT_VERSION:
        raise UserError(f"{where}: format version {version}, expected {FORMAT_VERSION}")


def _check_model(trained_for: Mapping[str, Any] | None, model: Mapping[str, Any] | None, where: str) -> None:
    if not trained_for or model is None:
        return
    if trained_for.get("config_hash") != model.get("config_hash"):
        told = [
            f"{one.get('id')} (hash {str(one.get('config_hash'))[:12]}, {one.get('shapes')})"
            for one in (trained_for, model)
        ]
        raise UserError(f"ckpt={where}: trained for {told[0]}, the model is {told[1]}")


def _with_weights(policy: Policy, state: Mapping[str, Tensor], where: str) -> Policy:
    want = {name: tuple(held.shape) for name, held in policy.state_dict().items()}
    have = {name: tuple(held.shape) for name, held in state.items()}
    if want and not have:
        raise UserError(f"{where}: names what is learned and has no weights: train it with train.py, and name its run")
    if want != have:
        name = next(iter(sorted(set(want.items()) ^ set(have.items()))))[0]
        raise UserError(f"{where}: weight {name} has shape {have.get(name)}, the policy expects {want.get(name)}")
    policy.load_state_dict(dict(state))
    return policy.eval().requires_grad_(False)


def save_policy(
    policy: Policy,
    folder: str | Path,
    *,
    model: Mapping[str, Any],
    budgets: Mapping[float, Sequence[Sequence[float]]] | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Export a policy as a folder: `policy.yaml`, `policy.safetensors`, `budgets.csv`, `manifest.json`, `README.md`.

    Args:
        folder: created where it is missing; files of an older export are replaced.
        model: description of the model it was trained for (`learnkv.inference.models.describe_model`).
        budgets: mean kept fraction [L][H] at each asked one, for policies whose budgets depend on the prompt; static
            budgets are computed here.
        training: the training configuration, plain containers.
        metrics: figures of the training run.
    """
    where = Path(folder).expanduser()
    where.mkdir(parents=True, exist_ok=True)
    table = dict(budgets) if budgets is not None else static_budgets(policy, model["shapes"])
    save_file({k: v.detach().cpu().contiguous() for k, v in policy.state_dict().items()}, where / "policy.safetensors")
    if policy.adapter is not None:
        adapters.write(policy.adapter, where / adapters.FOLDER)
    _write(where / "policy.yaml", yaml.safe_dump(policy.spec(), sort_keys=False))
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": dict(model),
        "adapter": policy.adapter is not None,
        "budgets": "static" if policy.allocator.static else "mean over prompts",
        "training": dict(training or {}),
        "metrics": dict(metrics or {}),
    }
    _write(where / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    _write(where / "budgets.csv", budget_table.text(table))
    _write(where / "README.md", card(manifest, policy.spec(), table))
    return where


def _write(file: Path, text: str) -> None:
    """Replace a file, or leave the old one as it was."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def static_budgets(policy: Policy, shapes: Mapping[str, int]) -> dict[float, list[list[float]]]:
    """Kept fraction [L][H] of a policy whose budgets do not depend on the prompt, at each fraction of the grid."""
    if not policy.allocator.static:
        raise UserError("budgets depend on the prompt: give save_policy the mean budgets that training measured")
    layers, heads, n = shapes["layers"], shapes["heads"], _NOMINAL_ENTRIES
    table = {}
    for keep in GRID:
        total = round(keep * n * layers * heads)
        protected = min(policy.sinks + policy.recent, total // (2 * layers * heads))
        scores = torch.zeros(1, 1, 1, n).index_fill(-1, torch.arange(protected), torch.inf)
        with torch.no_grad():
            per_head = torch.tensor([total / (layers * heads)], dtype=torch.float64)
            wanted = policy.allocator(scores.expand(layers, 1, heads, n), None, per_head)
        budgets = round_to_budget(wanted, *(torch.tensor([one]) for one in (n, total, protected)))
        table[keep] = (budgets[:, 0].double() / n).tolist()
    return table
