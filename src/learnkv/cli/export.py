"""`learnkv export --ckpt PATH --out PATH [--format …]`: export a trained policy, or its budgets in another format."""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from learnkv.errors import UserError
from learnkv.formats import budgets, duo, headkv, layers, lukv, modelopt
from learnkv.formats.files import make_folder, read_json
from learnkv.inference.models import attention_layers
from learnkv.persistence import hub
from learnkv.persistence.policies import load_policy, policy_folder, save_policy, static_budgets
from learnkv.persistence.stored_policy import load_checkpoint
from learnkv.persistence.torch_export import export_budgets
from learnkv.policy.policy import Policy

MODELOPT_LABELS = {"8": "FP8", "K8V4": "FP8_K_NVFP4_V", "4": "NVFP4"}
"""Precisions of policies with as many bits as a format of ModelOpt."""


@dataclass(frozen=True)
class ExportConfig:
    """Export the policy of a training checkpoint, or the budgets of any trained policy in the format of another method.

    Args:
        ckpt: checkpoint of `train.py`; for budgets and `push` also the folder of a policy or of a run, or `reference`.
        out: output path: a folder for `policy` (`policy.yaml`, `policy.safetensors`, `budgets.csv`, `manifest.json`,
            `README.md`) and for `duo`, a file for the others.
        format: `policy`; or its budgets as HeadKV's head scores (`headkv`: kept fractions), as DuoAttention's pattern
            (`duo`: kept fractions over the largest), as LU-KV's curve (`lukv`), or as a JSON list of one kept fraction
            per layer (`layers`; with `tokens`, whole pages of one prompt length); or a format of keys and values per
            layer, as ModelOpt writes it (`modelopt`, hf_quant_config.json); or the program that computes its budgets,
            by torch.export (`torch-export`, .pt2).
        keep: global kept fraction of the exported budgets, for `headkv`, `duo`, `layers` and `modelopt`.
        tokens: prompt length for `layers`: a list of tokens per layer instead of fractions; 0: fractions.
        page: tokens per page of these.
        bits: mean bits per number for `modelopt`, 4.5 to 8.
        model: names the attention layers for `modelopt`; default: the model that the policy was trained for.
        group: repetitions of the score of each kv head, for `headkv`: query heads per kv head where a program expects
            one score per query head.
        push: `owner/name` of the Hugging Face hub to upload the policy's folder to; default: no upload.
        allow: module prefixes besides learnkv whose classes the checkpoint may name.
    """

    ckpt: str = ""
    out: str = ""
    format: Literal["policy", "headkv", "duo", "lukv", "layers", "modelopt", "torch-export"] = "policy"
    keep: float = 0.1
    group: int = 1
    tokens: int = 0
    page: int = 16
    bits: float = 6.0
    model: str = ""
    push: str = ""
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        uploads_folder = self.push and Path(self.ckpt).suffix != ".ckpt"
        for key in ("ckpt",) if uploads_folder else ("ckpt", "out"):
            if not getattr(self, key):
                raise UserError(f"{key}=: expected a path, got nothing")
        if not 0 < self.keep <= 1 or self.group < 1:
            raise UserError(f"keep={self.keep:g} group={self.group}: expected 0 < keep <= 1 and group >= 1")
        if self.tokens < 0 or self.page < 1:
            raise UserError(f"tokens={self.tokens} page={self.page}: expected tokens >= 0 and page >= 1")
        for key, kind in (("tokens", "layers"), ("model", "modelopt")):
            if getattr(self, key) and self.format != kind:
                raise UserError(f"{key}={getattr(self, key)}: belongs to format={kind}, got format={self.format}")
        if self.push and (self.format != "policy" or (uploads_folder and self.out)):
            raise UserError(f"push={self.push}: sends the folder of a policy, expected no format= and no other out=")


def export(config: ExportConfig, resolved: str) -> None:
    """Write the export and print its path."""
    policy = load_policy(config.ckpt, config.allow)
    if config.format == "torch-export":
        _report("torch-export", export_budgets(config.out, policy, _model(config.ckpt)["shapes"]))
    elif config.format != "policy":
        static = "the same for every prompt" if policy.allocator.static else "mean over the validation prompts"
        _report(config.format, _write_budgets(config, policy), f"budgets: {static}")
    elif config.push:
        folder = _write_policy(config, policy) if config.out else _trained_folder(config.ckpt)
        _report("pushed", hub.push(folder, config.push))
    else:
        _report("policy", _write_policy(config, policy))


def _report(name: str, path: object, note: str = "") -> None:
    print(f"{name}: {path}" + (f" ({note})" if note else ""), file=sys.stderr)


def _write_policy(config: ExportConfig, policy: Policy) -> Path:
    """Write the policy of a checkpoint as a folder."""
    if Path(config.ckpt).suffix != ".ckpt":
        raise UserError(f"ckpt={config.ckpt}: expected a checkpoint (.ckpt) of train.py")
    stored, folder = _stored(config.ckpt), make_folder(Path(config.out).expanduser(), "out")
    budgets, training = stored.get("budgets"), stored.get("training")
    return save_policy(policy, folder, model=stored["model"], budgets=budgets, training=training)


def _stored(file: str) -> dict[str, Any]:
    """The part of a checkpoint that learnkv adds."""
    stored: dict[str, Any] = load_checkpoint(file)["learnkv"]
    return stored


def _trained_folder(path: str) -> Path:
    """The folder of a trained policy."""
    folder = policy_folder(path)
    if folder is None:
        raise UserError(f"ckpt={path}: expected a trained policy, a checkpoint (.ckpt) or a folder")
    return folder


def _model(path: str) -> dict[str, Any]:
    """Description of the model that a policy was trained for."""
    is_checkpoint = Path(path).suffix == ".ckpt"
    stored = _stored(path) if is_checkpoint else read_json(_trained_folder(path) / "manifest.json")
    model: dict[str, Any] = stored["model"]
    return model


def _write_budgets(config: ExportConfig, policy: Policy) -> Path:
    table = _budgets(config.ckpt, policy)
    kept = budgets.interpolate(table, config.keep)  # [L, H]
    if config.format == "headkv":
        scores = [[[keep] for keep in layer for _ in range(config.group)] for layer in kept.tolist()]
        return headkv.write(config.out, scores)
    if config.format == "duo":
        source = {"keep": config.keep, "policy": config.ckpt, "static": policy.allocator.static}
        return duo.write(config.out, kept / kept.max(), policy.sinks, policy.recent, source)
    if config.format == "layers":
        shares = kept.mean(-1).tolist()
        if config.tokens:
            return layers.write(config.out, layers.paged(shares, config.keep, config.tokens, config.page))
        return layers.write(config.out, [round(keep, 6) for keep in shares])
    if config.format == "modelopt":
        return _write_formats(config, policy, kept.mean(-1).tolist())
    evicted = [1 - budgets.interpolate(table, 1 - target / 100) for target in range(1, lukv.TARGETS + 1)]
    return lukv.write(config.out, torch.stack(evicted).float())


def _write_formats(config: ExportConfig, policy: Policy, importance: list[float]) -> Path:
    """ModelOpt's formats: those of a policy's uniform precision, else by its budgets."""
    stored = _model(config.ckpt)
    names = attention_layers(config.model or str(stored["id"]), str(stored["config_hash"]))
    if policy.precision is None:
        formats = modelopt.share_bits(importance, config.bits)
    elif (kind := MODELOPT_LABELS.get(policy.precision.label)) is not None:
        formats = [kind] * len(names)
    else:
        expected = ", ".join(MODELOPT_LABELS)
        raise UserError(f"precision={policy.precision.label}: ModelOpt's layers have one format, expected {expected}")
    print(f"bits per number: {modelopt.mean_bits(formats):.3f}", file=sys.stderr)
    return modelopt.write(config.out, names, formats, version("learnkv"))


def _budgets(path: str, policy: Policy) -> budgets.Table:
    """The budgets that training measured, or those of a policy for which they do not depend on the prompt."""
    if Path(path).suffix == ".ckpt":
        stored = _stored(path)
        return stored.get("budgets") or static_budgets(policy, stored["model"]["shapes"])
    return budgets.read(_trained_folder(path) / "budgets.csv")
