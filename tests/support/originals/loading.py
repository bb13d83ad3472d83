"""Golden cases, and our policies as their YAML builds them."""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from learnkv.core.codec import Codec
from learnkv.core.observation import Observation
from learnkv.ops.rotary import Layout, Rotary
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

POLICIES = Path(__file__).resolve().parents[3] / "configs" / "policies"


@functools.cache
def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@functools.cache
def sidecar_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


class Case:
    """One case of a golden file; a check must have read every output by its end.

    `shared` holds the arrays that belong to the whole file, `path` is the file without its suffix. Inputs are in
    another file, among the shared arrays, or among those of the case.
    """

    def __init__(self, path: Path, number: int) -> None:
        sidecar, arrays = sidecar_of(path), arrays_of(path.with_suffix(".npz"))
        record = sidecar["cases"][number]
        self.number = number
        self.path, self.params, self.notes = path, record["params"], record.get("notes") or {}
        self.inputs = path.with_name(sidecar["inputs_file"]) if sidecar.get("inputs_file") else None
        self.shared = {name: array for name, array in arrays.items() if "__" not in name}
        self.unread = {
            name: arrays[f"{record['id']}__{name}"] for name in record.get("outputs", record.get("arrays", ()))
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self.unread.pop(name)

    def of(self, other: str) -> dict[str, np.ndarray]:
        """Outputs of another case of the file, which this one shares."""
        arrays = arrays_of(self.path.with_suffix(".npz"))
        return {name.removeprefix(f"{other}__"): held for name, held in arrays.items() if name.startswith(f"{other}__")}

    def __contains__(self, name: str) -> bool:
        return name in self.unread


@functools.cache
def built(name: str, changes: str) -> Policy:
    """The policy that configs/policies/<name>.yaml describes, with constructor arguments changed (JSON).

    Components under `replaced` take the place of the YAML's.
    """
    config, arguments_of = yaml.safe_load((POLICIES / f"{name}.yaml").read_text()), json.loads(changes)
    config |= arguments_of.pop("replaced", {})
    for component, arguments in arguments_of.items():
        config[component].setdefault("init_args", {}).update(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return load_policy(path)


BUILT: set[str] = set()
"""Names of the YAML files whose policies were built."""


def policy(name: str, **changes: dict[str, Any]) -> Policy:
    BUILT.add(name)
    return built(name, json.dumps(changes, sort_keys=True))


def codec(name: str, part: str, **arguments: Any) -> Codec:
    """What the YAML's policy stores `keys` or `values` with, with constructor arguments changed."""
    stored = yaml.safe_load((POLICIES / f"{name}.yaml").read_text())["precision"]["init_args"][part]
    stored["init_args"].update(arguments)
    precision = policy(name, precision={part: stored}).precision
    assert precision is not None
    (level,) = precision.levels
    return getattr(level, part)


def inputs_of(case: Case) -> dict[str, Tensor]:
    """q, k, v and q_pre; the originals of query-head granularity repeat keys and values first."""
    assert case.inputs is not None
    inputs = {name: torch.from_numpy(array) for name, array in arrays_of(case.inputs).items()}
    if case.params.get("granularity") == "query_head":
        group = inputs["q"].shape[1] // inputs["k"].shape[1]
        inputs |= {name: inputs[name].repeat_interleave(group, 1) for name in ("k", "v")}
    return inputs


def scored(case: Case, policy: Policy, scale: float = 1.0, **more: Any) -> Tensor:
    """Scores [B, H, T] of the case's inputs with its queries multiplied by `scale`; `more` as in `observation`."""
    inputs = inputs_of(case)
    before = max(inputs["k"].shape[2] - policy.scorer.window, 0)
    return policy.scorer(observation(scale * inputs["q"][:, :, before:], inputs["k"], inputs["v"], **more))


def observation(queries: Tensor, keys: Tensor, values: Tensor, **more: Any) -> Observation:
    """An unpadded prompt; `more` are further fields of the observation."""
    (batch, heads, entries, dim), window = keys.shape, queries.shape[2]
    fields: dict[str, Any] = {
        "layer_idx": 0,
        "query_positions": torch.arange(entries - window, entries).expand(batch, window),
        "scaling": dim**-0.5,
        "valid": torch.ones(batch, heads, entries, dtype=torch.bool),
        "positions": torch.arange(entries).expand(batch, heads, entries),
    }
    return Observation(queries=queries, keys=keys, values=values, **(fields | more))


def projection(case: Case) -> Callable[[], Tensor] | None:
    """The case's output projection, as an observation has it."""
    return (lambda: torch.from_numpy(case.shared["Wo"])) if "Wo" in case.shared else None


def whole(case: Case, policy: Policy, scale: float = 1.0, **more: Any) -> Observation:
    """The case's inputs with all queries, the rotation they have, and what the policy's scorer gathers from them."""
    inputs = inputs_of(case)
    dim, length = inputs["q"].shape[3], inputs["q"].shape[2]
    frequency = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (torch.arange(length).unsqueeze(-1) * frequency).unsqueeze(0)
    rope = Rotary(((angle.cos().float(), angle.sin().float()),), Layout.halves(dim // 2))
    fields = {"rotation": lambda: rope, "project": projection(case)} | more
    obs = observation(scale * inputs["q"], inputs["k"], inputs["v"], **fields)
    return dataclasses.replace(
        obs, statistics={one: one.update(obs, None) for one in policy.scorer.capture_spec.statistics}
    )
