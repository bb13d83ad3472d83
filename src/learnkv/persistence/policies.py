"""Policies on disk: heuristics as YAML, trained ones as checkpoints or exported folders."""

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from learnkv.errors import UserError
from learnkv.formats import budgets as budget_table
from learnkv.formats.files import MODELS_WITH_TABLES, make_folder, output_file, write_text
from learnkv.inference import lora as adapters
from learnkv.inference.fingerprint import describe_with_weights, other_weights
from learnkv.inference.models import describe_model
from learnkv.ops.round_to_budget import round_to_budget
from learnkv.persistence import custom_generate, hub
from learnkv.persistence.allowed_classes import check_classes
from learnkv.persistence.config_errors import explain
from learnkv.persistence.model_card import model_card
from learnkv.persistence.named_configs import find_config
from learnkv.persistence.stored_policy import (
    FORMAT_VERSION,
    StoredPolicy,
    check_digests,
    check_model,
    digests_of,
    read_spec,
    stored_in_checkpoint,
    stored_in_folder,
)
from learnkv.policy.model_sizes import SIZES
from learnkv.policy.policy import Policy

GRID = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
"""Kept fractions at which an export tabulates budgets."""
_REFERENCE = Path(__file__).resolve().parents[1] / "reference"
SHIPPED = {
    "reference": _REFERENCE / "policy",
    "smollm2": _REFERENCE / "smollm2" / "policy",
    "smollm2-text": _REFERENCE / "smollm2-text" / "policy",
}
"""Folders of the trained policies in this package, by the name that `ckpt=` takes."""
_NOMINAL_ENTRIES = 4096


def build_policy(spec: Mapping[str, Any], allow: Sequence[str] = (), where: str = "policy") -> Policy:
    """A policy from the mapping of its constructor's arguments.

    Args:
        spec: as `Policy.spec()` gives it, or as in a YAML of `configs/policies`.
        allow: module prefixes besides `learnkv` whose classes may be named.
        where: name of the mapping in errors.

    Raises:
        UserError: a class that is not allowed, an unknown argument, a value of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    if isinstance(allow, str):
        raise UserError(f"allow={allow!r}: expected a list of modules, such as [{allow!r}]")
    check_classes(spec, ("learnkv", *allow), where)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Policy, "policy")
    try:
        parsed = parser.parse_object({"policy": dict(spec)})
        policy = parser.instantiate(parsed)["policy"]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (ArgumentError, TypeError, ValueError) as error:
        message = str(error).replace('key "policy.', 'key "')  # the mapping has no name in the user's file
        raise UserError(f"{where}: {explain(message, {}, list(inspect.signature(Policy).parameters))}") from None
    assert isinstance(policy, Policy)
    return policy


def modules_of(spec: Any) -> set[str]:
    """Top-level modules of the classes in a policy's arguments: the `allow` of a spec that the user typed."""
    if not isinstance(spec, Mapping):
        return set()
    top_level = {str(spec["class_path"]).split(".")[0]} if "class_path" in spec else set()
    return top_level.union(*(modules_of(value) for value in spec.values()))


def fill_sizes(spec: Any, shapes: Mapping[str, int]) -> Any:
    """A policy's arguments with the model's sizes in place of zeros in learned components.

    Args:
        spec: `Policy.spec()`, or a part of it.
        shapes: compressed layers, kv heads, query heads per kv head and other sizes (`describe_model`).
    """
    if not isinstance(spec, dict):
        return spec
    return {
        key: shapes[SIZES[key]] if key in SIZES and value == 0 else fill_sizes(value, shapes)
        for key, value in spec.items()
    }


def parameter_share(policy: Policy, model: nn.Module) -> float:
    """Parameters of the policy over those of the model; tied weights count once. Both may be on the meta device."""
    counts = [sum(weight.numel() for weight in module.parameters()) for module in (policy, model)]
    return counts[0] / counts[1]


def load_policy(
    path: str | Path, allow: Sequence[str] = (), model: Mapping[str, Any] | nn.Module | None = None
) -> Policy:
    """A policy from a Lightning checkpoint, an exported folder, a training run's folder, or a heuristic's YAML.

    Args:
        path: file or folder; a bare name finds `configs/policies/NAME.yaml`, with the tables of `model` where it reads
            any and this package has them; names of `SHIPPED` are trained policies in this package;
            `owner/name` or `owner/name@revision`, where there is no such path, a policy on the Hugging Face hub.
        allow: module prefixes besides `learnkv` whose classes the file may name.
        model: the model to use it with, or its description (`describe_model`, `describe_with_weights`); a policy that
            was trained for another one is refused. For one of the same shape with other weights there is a warning,
            which `policy.other_weights` keeps.

    Raises:
        UserError: missing, corrupt or foreign file.
    """
    file = Path(path).expanduser()
    if (folder := policy_folder(path)) is not None:
        stored = stored_in_folder(folder)
    elif file.suffix == ".ckpt":
        stored = stored_in_checkpoint(file)
    else:
        spec = read_spec(find_config("policies", str(path), "ckpt"))
        stored = StoredPolicy(spec if file.is_file() else _with_tables_of(spec, model), {})
    if stored.state:
        _check_size(stored, allow, str(path))
    policy = build_policy(stored.spec, allow, str(path))
    policy.adapter = stored.adapter
    policy.trained_for = stored.model or None
    if model is not None and stored.model:
        described = model if isinstance(model, Mapping) else _described(model, stored.model)
        check_model(stored, described, str(path))
        policy.other_weights = other_weights(stored.model, described)
        if policy.other_weights is not None:
            warnings.warn(f"ckpt={path}: {policy.other_weights}", stacklevel=2)
    loaded = _with_weights(policy, stored.state, str(path))
    if folder is not None:
        check_digests(folder)
    return loaded


def _with_tables_of(spec: Any, model: Mapping[str, Any] | nn.Module | None) -> Any:
    """A method's arguments with the tables of a model that this package has some of, in place of the reference's."""
    if model is None:
        return spec
    name = (model if isinstance(model, Mapping) else describe_model(model))["id"]
    return _renamed(spec, name) if name in MODELS_WITH_TABLES else spec


def _renamed(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(item, name) for key, item in value.items()}
    return name if value == "reference" else value


def _described(model: Any, trained_for: Mapping[str, Any]) -> dict[str, Any]:
    """Description of a model, with its weights where those that the policy was trained for are known."""
    return describe_with_weights(model) if trained_for.get("weights") else describe_model(model)


def _check_size(stored: StoredPolicy, allow: Sequence[str], name: str) -> None:
    """Compare the weights with the policy's sizes before anything of a stranger's sizes is allocated."""
    try:
        with torch.device("meta"):
            policy = build_policy(stored.spec, allow, name)
    except RuntimeError:  # a component computes with what it reads: its own checks follow
        return
    _check_shapes(policy, stored.state, name)


def _check_shapes(policy: Policy, state: Mapping[str, Tensor], name: str) -> None:
    expected = {key: tuple(weight.shape) for key, weight in policy.state_dict().items()}
    given = {key: tuple(weight.shape) for key, weight in state.items()}
    if expected and not given:
        raise UserError(f"{name}: has learned components without weights: train it with train.py, and name its run")
    if expected != given:
        key = min(set(expected.items()) ^ set(given.items()))[0]
        raise UserError(f"{name}: weight {key} has shape {given.get(key)}, the policy expects {expected.get(key)}")


def _with_weights(policy: Policy, state: Mapping[str, Tensor], name: str) -> Policy:
    _check_shapes(policy, state, name)
    adapter = {} if policy.adapter is None else dict(policy.adapter.state)
    for key, weight in [*state.items(), *adapter.items()]:
        if not bool(weight.isfinite().all()):
            raise UserError(f"{name}: weight {key} has numbers that are not finite: the training diverged, train again")
    policy.load_state_dict(dict(state))
    return policy.eval().requires_grad_(False)


def policy_folder(path: str | Path) -> Path | None:
    """Folder of a trained policy: its own, the one in a run's folder, the shipped one, or a download from the hub.

    None for a file.

    Raises:
        UserError: a policy of the hub that cannot be fetched.
    """
    folder = Path(path).expanduser()
    if str(path) in SHIPPED and not folder.exists():
        return SHIPPED[str(path)]
    if hub.is_repository(str(path)):
        return hub.fetch(str(path))
    if not folder.is_dir():
        return None
    is_run = not (folder / "policy.yaml").exists() and (folder / "policy" / "policy.yaml").exists()
    return folder / "policy" if is_run else folder


def describe_policy_file(path: str | Path) -> str:
    """Name of a policy in tables: the file name of a heuristic, `learned` or `learned-RUN` for a trained one."""
    file = Path(path).expanduser()
    if str(path) in SHIPPED and not file.exists():
        return f"learned{''.join(str(path).partition('-')[1:])}"
    if hub.is_repository(str(path)):
        name = str(path).partition("@")[0].rpartition("/")[2]
    elif file.suffix != ".ckpt" and not file.is_dir():
        return file.stem
    else:
        folder = file.resolve()
        run = folder.parent.parent if file.suffix == ".ckpt" else folder.parent if folder.name == "policy" else folder
        name = run.name
    return name if name.startswith("learned") else f"learned-{name}"


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

    Beside them lies `custom_generate/`, for transformers' `generate(custom_generate=…)`; `load_policy` reads no code.

    Args:
        folder: created where it is missing; files of an older export are replaced.
        model: description of the model it was trained for (`learnkv.inference.fingerprint.describe_with_weights`).
        budgets: mean kept fraction [L][H] at each global one, for policies whose budgets depend on the prompt; static
            budgets are computed here.
        training: the training configuration, plain containers.
        metrics: metrics of the training run.
    """
    path = make_folder(Path(folder).expanduser(), "folder")
    table = dict(budgets) if budgets is not None else static_budgets(policy, model["shapes"])
    with output_file(path / "policy.safetensors") as part:
        save_file({key: weight.detach().cpu().contiguous() for key, weight in policy.state_dict().items()}, part)
    if policy.adapter is not None:
        adapters.write(policy.adapter, path / adapters.FOLDER)
    write_text(path / "policy.yaml", yaml.safe_dump(policy.spec(), sort_keys=False))
    write_text(path / "budgets.csv", budget_table.text(table))
    manifest = {
        "format_version": FORMAT_VERSION,
        "model": dict(model),
        "adapter": policy.adapter is not None,
        "budgets": "static" if policy.allocator.static else "mean over prompts",
        "training": dict(training or {}),
        "metrics": dict(metrics or {}),
        "files": digests_of(path),
    }
    write_text(path / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    write_text(path / "README.md", model_card(manifest, policy.spec(), table))
    custom_generate.write(path)
    return path


def static_budgets(policy: Policy, shapes: Mapping[str, int]) -> dict[float, list[list[float]]]:
    """Kept fraction [L][H] of a policy whose budgets do not depend on the prompt, at each fraction of the grid."""
    if not policy.allocator.static:
        raise UserError("budgets depend on the prompt: give save_policy the mean budgets that training measured")
    layers, heads, n = shapes["layers"], shapes["heads"], _NOMINAL_ENTRIES
    table = {}
    for keep in GRID:
        total = round(keep * n * layers * heads)
        protected = min(policy.sinks + policy.recent, total // (2 * layers * heads))
        scores = torch.zeros(1, 1, 1, n, dtype=torch.float32).index_fill(-1, torch.arange(protected), torch.inf)
        with torch.no_grad():
            per_head = torch.tensor([total / (layers * heads)], dtype=torch.float64)
            wanted = policy.allocator(scores.expand(layers, 1, heads, n), None, per_head)
        budgets = round_to_budget(wanted, *(torch.tensor([count]) for count in (n, total, protected)))
        table[keep] = (budgets[:, 0].double() / n).tolist()
    return table
