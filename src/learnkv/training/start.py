"""`start=`: a trained policy whose weights training begins with."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.formats.files import file_digest
from learnkv.inference import lora as adapters
from learnkv.inference.fingerprint import other_weights
from learnkv.persistence.policies import load_policy, policy_folder
from learnkv.persistence.stored_policy import digests_of
from learnkv.policy.policy import Policy


def start_digest(name: str | None) -> str | None:
    """SHA-256 over the files of a start policy, wherever they lie; None without one.

    Raises:
        UserError: no trained policy of this name.
    """
    if name is None:
        return None
    source = _source(name)
    return file_digest(source) if source.is_file() else hashlib.sha256(repr(digests_of(source)).encode()).hexdigest()


def check_outside(name: str | None, output: Path) -> None:
    """Raise UserError for a start policy below the folder of the run, which the run would replace."""
    if name is not None and _source(name).resolve().is_relative_to(output.resolve()):
        raise UserError(f"start={name}: lies in output={output}, which the run writes; expected another output=")


def _source(name: str) -> Path:
    """The checkpoint of a start policy, or the folder of its export."""
    file = Path(name).expanduser()
    try:
        source = file if file.suffix == ".ckpt" and file.is_file() else policy_folder(name)
    except UserError as error:
        raise _named(name, error) from None
    if source is None:
        raise UserError(
            f"start={name}: expected a trained policy: a checkpoint, the folder of a run or of an export, reference or "
            "smollm2"
        )
    if source.is_dir() and not (source / "policy.yaml").is_file():
        raise UserError(f"start={name}: expected a trained policy, its folder has no policy.yaml")
    return source


def _named(name: str, error: UserError) -> UserError:
    """The error of loading a start policy, with the key as typed."""
    return UserError(f"start={name}: {str(error).removeprefix('ckpt=').removeprefix(f'{name}: ')}")


def take_weights(
    name: str, policy: Policy, model: nn.Module, description: Mapping[str, Any], allow: Sequence[str]
) -> str:
    """Copy the weights of a start policy into a new one, by name; returns one line about them.

    Args:
        name: the start policy, as `load_policy` takes it.
        policy: the new policy; weights that the start policy lacks stay as they are, and so does a new adapter.
        model: the model, which has the new policy's adapter.
        description: of the model (`describe_with_weights`).
        allow: module prefixes besides `learnkv` whose classes the start policy may name.

    Raises:
        UserError: a policy that cannot be loaded, was trained for another model, has no weight in common, or has a
            weight of another shape or another adapter.
    """
    start = _loaded(name, description, allow)
    own, given = dict(policy.named_parameters()), dict(start.named_parameters())
    common = sorted(own.keys() & given.keys())
    for key in common:
        if own[key].shape != given[key].shape:
            raise UserError(
                f"start={name}: weight {key} has shape {tuple(given[key].shape)}, the policy expects "
                f"{tuple(own[key].shape)}"
            )
    if not common:
        raise UserError(f"start={name}: has no weight in common with the policy, which has {_listed(own)}")
    _check_adapter(name, start.adapter, policy.adapter)
    with torch.no_grad():
        for key in common:
            own[key].copy_(given[key])
        anew = sorted(own.keys() - given.keys())
        if policy.adapter is not None and start.adapter is None:
            anew.append("adapter")
        elif policy.adapter is not None and start.adapter is not None:
            _take_adapter(start.adapter, policy.adapter, model)
            common.append("adapter")
    return (
        f"start={name}: takes {_listed(common)}; begins anew: {_listed(anew)}; not used: "
        f"{_listed(sorted(given.keys() - own.keys()))}"
    )


def _loaded(name: str, description: Mapping[str, Any], allow: Sequence[str]) -> Policy:
    """The start policy; UserError where it was trained for another model or for other weights of it."""
    try:
        start = load_policy(name, allow, {**description, "weights": None})  # weights: refused below, not warned of
    except UserError as error:
        raise _named(name, error) from None
    if (fault := other_weights(start.trained_for or {}, description)) is not None:
        raise UserError(f"start={name}: {fault}")
    return start


def _check_adapter(name: str, given: Adapter | None, own: Adapter | None) -> None:
    """Raise UserError where the start policy was trained beside an adapter and the new one is not beside the same."""
    if given is not None and _settings(given) != _settings(own):
        raise UserError(
            f"start={name}: has a LoRA adapter of {_settings(given)}, the policy has {_settings(own)}; expected the "
            "same lora.rank, lora.alpha and lora.targets"
        )


def _settings(adapter: Adapter | None) -> str:
    if adapter is None:
        return "none"
    return f"rank {adapter.rank}, alpha {adapter.alpha:g}, targets {','.join(sorted(adapter.targets))}"


def _take_adapter(given: Adapter, own: Adapter, model: nn.Module) -> None:
    for key, weight in adapters.weights(model, own).items():
        weight.copy_(given.state[key])


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
