"""`learnkv export --ckpt PATH --out PATH [--format …]`: a trained policy, or its budgets, for others."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from learnkv.errors import UserError
from learnkv.formats import budgets, duo, headkv, layers, lukv
from learnkv.formats.files import make_folder, read_json
from learnkv.persistence import hub
from learnkv.persistence.policies import load_policy, policy_folder, save_policy, static_budgets
from learnkv.persistence.stored_policy import load_checkpoint
from learnkv.persistence.torch_export import export_budgets
from learnkv.policy.policy import Policy


@dataclass(frozen=True)
class ExportConfig:
    """Export the policy of a training checkpoint, or the budgets of any trained policy in the format of another method.

    Args:
        ckpt: checkpoint of `train.py`; for budgets and `push` also the folder of a policy or of a run, or `reference`.
        out: what to write: a folder for `policy` (`policy.yaml`, `policy.safetensors`, `budgets.csv`, `manifest.json`,
            `README.md`) and for `duo`, a file for the others.
        format: `policy`; or its budgets as HeadKV's head scores (`headkv`: kept fractions), as DuoAttention's pattern
            (`duo`: kept fractions over the largest), as LU-KV's curve (`lukv`), or as a JSON list of one kept fraction
            per layer (`layers`); or what computes its budgets, as a program of torch.export (`torch-export`, .pt2).
        keep: global kept fraction whose budgets are meant, for `headkv`, `duo` and `layers`.
        group: how often to repeat the score of a kv head, for `headkv`: query heads per kv head for programs that
            expect one score for each.
        push: `owner/name` of the Hugging Face hub that a policy's folder is sent to; nothing is sent without it.
        allow: module prefixes besides learnkv whose classes the checkpoint may name.
    """

    ckpt: str = ""
    out: str = ""
    format: Literal["policy", "headkv", "duo", "lukv", "layers", "torch-export"] = "policy"
    keep: float = 0.1
    group: int = 1
    push: str = ""
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sent = self.push and Path(self.ckpt).suffix != ".ckpt"  # a folder is sent as it is
        for key in ("ckpt",) if sent else ("ckpt", "out"):
            if not getattr(self, key):
                raise UserError(f"{key}=: expected a path, got nothing")
        if not 0 < self.keep <= 1 or self.group < 1:
            raise UserError(f"keep={self.keep:g} group={self.group}: expected 0 < keep <= 1 and group >= 1")
        if self.push and (self.format != "policy" or (sent and self.out)):
            raise UserError(f"push={self.push}: sends the folder of a policy, expected no format= and no other out=")


def export(config: ExportConfig, resolved: str) -> None:
    """Write it and say where it is."""
    policy = load_policy(config.ckpt, config.allow)
    if config.format == "torch-export":
        _say("torch-export", export_budgets(config.out, policy, _model(config.ckpt)["shapes"]))
    elif config.format != "policy":
        depend = "mean over the validation prompts, of each one they are others" * (not policy.allocator.static)
        _say(config.format, _write_budgets(config, policy), f"budgets: {depend or 'the same for every prompt'}")
    elif config.push:
        folder = _policy(config, policy) if config.out else _trained(config.ckpt)
        _say("pushed", hub.push(folder, config.push))
    else:
        _say("policy", _policy(config, policy))


def _say(what: str, where: object, more: str = "") -> None:
    print(f"{what}: {where}" + (f" ({more})" if more else ""), file=sys.stderr)


def _policy(config: ExportConfig, policy: Policy) -> Path:
    """The folder of a checkpoint's policy."""
    if Path(config.ckpt).suffix != ".ckpt":
        raise UserError(f"ckpt={config.ckpt}: expected a checkpoint (.ckpt) of train.py")
    held, folder = _held(config.ckpt), make_folder(Path(config.out).expanduser(), "out")
    return save_policy(policy, folder, model=held["model"], budgets=held.get("budgets"), training=held.get("training"))


def _held(file: str) -> dict[str, Any]:
    held: dict[str, Any] = load_checkpoint(file)["learnkv"]
    return held


def _trained(path: str) -> Path:
    """The folder of a trained policy."""
    folder = policy_folder(path)
    if folder is None:
        raise UserError(f"ckpt={path}: expected a trained policy, a checkpoint (.ckpt) or a folder")
    return folder


def _model(path: str) -> dict[str, Any]:
    """The model that a policy was trained for."""
    of_run = Path(path).suffix == ".ckpt"
    model: dict[str, Any] = (_held(path) if of_run else read_json(_trained(path) / "manifest.json"))["model"]
    return model


def _write_budgets(config: ExportConfig, policy: Policy) -> Path:
    known = _budgets(config.ckpt, policy)
    kept = budgets.interpolate(known, config.keep)  # [L, H]
    if config.format == "headkv":
        return headkv.write(config.out, [[[one] for one in row for _ in range(config.group)] for row in kept.tolist()])
    if config.format == "duo":
        told = {"keep": config.keep, "policy": config.ckpt, "static": policy.allocator.static}
        return duo.write(config.out, kept / kept.max(), policy.sinks, policy.recent, told)
    if config.format == "layers":
        return layers.write(config.out, [round(one, 6) for one in kept.mean(-1).tolist()])
    evicted = [1 - budgets.interpolate(known, 1 - target / 100) for target in range(1, lukv.TARGETS + 1)]
    return lukv.write(config.out, torch.stack(evicted).float())


def _budgets(path: str, policy: Policy) -> budgets.Table:
    """The budgets that training measured, or those of a policy for which they do not depend on the prompt."""
    if Path(path).suffix == ".ckpt":
        held = _held(path)
        return held.get("budgets") or static_budgets(policy, held["model"]["shapes"])
    return budgets.read(_trained(path) / "budgets.csv")
