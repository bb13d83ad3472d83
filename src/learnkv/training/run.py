"""`learnkv train config=NAME [key=value …]`: train a compression policy on a frozen model."""

import math
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from learnkv.core.adapter import Adapter
from learnkv.errors import Preempted, RunError, UserError
from learnkv.formats.files import make_folder, write_text
from learnkv.formats.folder_lock import folder_lock
from learnkv.inference import lora as adapters
from learnkv.inference.attention import attach
from learnkv.inference.fingerprint import describe_with_weights
from learnkv.inference.models import load_model
from learnkv.persistence.policies import build_policy, fill_sizes, modules_of, parameter_share, save_policy
from learnkv.persistence.stored_policy import FORMAT_VERSION
from learnkv.training import slurm
from learnkv.training.callbacks import pictures
from learnkv.training.callbacks.checkpoints import Checkpoints
from learnkv.training.callbacks.fence import fenced
from learnkv.training.callbacks.logs import is_timing
from learnkv.training.config import TrainConfig
from learnkv.training.data.datamodule import DataModule, context_lengths
from learnkv.training.module import Distillation
from learnkv.training.resuming import RunFolder, open_run
from learnkv.training.settings import DistillationSettings, Lora
from learnkv.training.start import take_weights
from learnkv.training.trainer import build_trainer


def train(config: TrainConfig, resolved: str) -> None:
    """Train or resume the run in `config.output`; writes `config.yaml`, checkpoints, metrics and the policy.

    Raises:
        UserError: bad settings, another program that writes into the folder, or one that cannot be written.
    """
    folder = make_folder(Path(config.output).expanduser(), "output")
    with folder_lock(folder, "output") if is_first_process() else nullcontext(), slurm.EarlyEnd().noting() as early:
        _train(config, resolved, early)


def is_first_process() -> bool:
    """Whether this is the process of a run that the others are started by, or the first of them."""
    nodes = (os.environ.get(name, "0") for name in ("NODE_RANK", "GROUP_RANK"))
    return rank_zero_only.rank == 0 and all(node == "0" for node in nodes)


def _train(config: TrainConfig, resolved: str, early: slurm.EarlyEnd) -> None:
    keys = yaml.safe_load(resolved)
    run = open_run(config, keys)
    if run.is_finished(config.trainer["max_steps"]):
        print(
            f"finished before, after {run.step} steps (overwrite=true starts anew)\npolicy: {run.policy}",
            file=sys.stderr,
        )
        return
    write_text(run.path / "config.yaml", resolved)
    L.seed_everything(config.seed, verbose=False)
    loaded = _load_model(config)
    early.check()
    model, tokenizer = loaded
    adapter = _add_adapter(model, config.distillation.lora)
    data = _data(config, model, tokenizer)
    description = describe_with_weights(model)
    run.check_model(description)
    module = _distillation(config, model, description, adapter, run, keys)
    trainer = build_trainer(config, run, keys)
    early.check()
    if _fit(trainer, module, data, run):
        _export(trainer, module, run)


def _load_model(config: TrainConfig) -> tuple[Any, Any]:
    on_gpu = torch.cuda.is_available() and config.trainer["accelerator"] in ("auto", "gpu", "cuda")
    dtype = "bfloat16" if config.dtype == "auto" and on_gpu else config.dtype
    model, tokenizer = load_model(config.model, config.revision, dtype, "cpu", config.attn)
    return attach(model), tokenizer


def _add_adapter(model: Any, lora: Lora | None) -> Adapter | None:
    if lora is None:
        return None
    adapter = Adapter(lora.rank, lora.alpha, lora.targets)
    adapters.add(model, adapter)
    return adapter


def _data(config: TrainConfig, model: Any, tokenizer: Any) -> DataModule:
    lengths = context_lengths(model, config.data)
    _check_smallest_budget(config.distillation, lengths[0])
    return DataModule(config.data, tokenizer, lengths, config.seed)


def _check_smallest_budget(settings: DistillationSettings, shortest: int) -> None:
    keep = settings.keep_bounds[0]
    if keep * shortest < 1:
        raise UserError(f"keep={keep:g}: leaves less than one entry per head of a context of {shortest} tokens")


def _distillation(
    config: TrainConfig,
    model: Any,
    description: Mapping[str, Any],
    adapter: Adapter | None,
    run: RunFolder,
    keys: Mapping[str, Any],
) -> Distillation:
    """The training module, with a new policy of the model's sizes; `start` where no checkpoint has its weights."""
    assert config.policy is not None
    spec = fill_sizes(config.policy.spec(), description["shapes"])
    allow = sorted(modules_of(spec))
    policy = build_policy(spec, allow).requires_grad_(True)
    policy.adapter = adapter
    if config.start is not None and not run.resumes:
        taken = take_weights(config.start, policy, model, description, allow)
        if is_first_process():
            print(taken, file=sys.stderr)
    settings = config.distillation
    return Distillation(
        model,
        policy,
        replace(settings, answers=settings.answers or str(run.path / "answers")),
        steps=config.trainer["max_steps"],
        seed=config.seed,
        description={
            "format_version": FORMAT_VERSION,
            "policy": spec,
            "model": dict(description),
            "training": keys,
            "contents": dict(run.contents),
        },
    )


def _fit(trainer: L.Trainer, module: Distillation, data: DataModule, run: RunFolder) -> bool:
    """Run the training; False on a process that ends silently after SIGTERM.

    Raises:
        Preempted: on the first process, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C; its message is how to go on.
    """
    try:
        trainer.fit(module, data, ckpt_path=run.checkpoint if run.resumes else None, weights_only=True)
    except SystemExit:  # Lightning's reaction to Ctrl-C
        saved = max(run.step, next(c.saved_step for c in trainer.callbacks if isinstance(c, Checkpoints)))
        after = f"resumes it from step {saved}" if saved > 0 else "begins anew, as no checkpoint was written"
        raise KeyboardInterrupt(f"interrupted after step {trainer.global_step}; the same command {after}") from None
    except Preempted:
        if trainer.is_global_zero:
            raise
        return False
    return True


def _export(trainer: L.Trainer, module: Distillation, run: RunFolder) -> None:
    """Export the policy, write pictures, and print where they are."""
    finite = {key: float(value) for key, value in trainer.callback_metrics.items() if math.isfinite(float(value))}
    metrics = {key: value for key, value in finite.items() if not is_timing(key)}
    metrics["parameter_share"] = parameter_share(module.policy, module.model)
    if not trainer.is_global_zero:
        return
    ended = f"ended after step {trainer.global_step} of {trainer.max_steps}; the same command resumes it"
    if module.budgets is None and not module.policy.allocator.static:
        raise RunError(f"{ended} (its budgets are measured by a validation)")
    if module.policy.adapter is not None:
        module.policy.adapter = adapters.current_weights(module.model, module.policy.adapter)
    folder = save_policy(
        module.policy,
        run.policy,
        model=module.description["model"],
        budgets=module.budgets,
        training=module.description["training"],
        metrics=metrics,
    )
    pictures.log_policy(trainer, folder)
    with fenced("pictures"):
        pictures.write_pictures(module, run.path)
    if trainer.global_step < trainer.max_steps:
        print(ended, file=sys.stderr)
    print(f"policy: {folder}\ncheckpoint: {run.checkpoint}", file=sys.stderr)
