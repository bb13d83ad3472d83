"""`learnkv train config=NAME [key=value …]`: train a compression policy on a frozen model."""

import logging
import math
import pickle
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger, WandbLogger

from learnkv.core.adapter import Adapter
from learnkv.errors import Preempted, UserError
from learnkv.inference import lora as adapters
from learnkv.inference.attention import attach
from learnkv.inference.models import context_length, describe_model, load_model
from learnkv.persistence.policies import FORMAT_VERSION, build_policy, save_policy
from learnkv.persistence.size import parameter_share, sized
from learnkv.training.callbacks import pictures
from learnkv.training.callbacks.checkpoints import Checkpoints
from learnkv.training.callbacks.logs import CsvTable
from learnkv.training.callbacks.progress import ProgressLine
from learnkv.training.config import TrainConfig
from learnkv.training.data.datamodule import Data
from learnkv.training.fsdp import Sharded
from learnkv.training.module import Distillation

MAY_CHANGE = ("trainer", "wandb", "workers", "save_every", "save_minutes", "overwrite", "answers")
"""Keys that a resumed run may have changed."""


def train(config: TrainConfig, resolved: str) -> None:
    """Train, or continue, the run that `config.output` holds; write `config.yaml`, checkpoints, metrics, the policy."""
    output = Path(config.output).expanduser()
    checkpoint = output / "checkpoints" / "last.ckpt"
    training = yaml.safe_load(resolved)
    resume = _prepare(output, checkpoint, config, training)
    step, trained_for = _read(checkpoint) if resume else (0, None)
    if step >= config.trainer["max_steps"] and (output / "policy" / "manifest.json").is_file():
        print(
            f"finished before, after {step} steps (overwrite=true starts anew)\npolicy: {output / 'policy'}",
            file=sys.stderr,
        )
        return
    (output / "config.yaml").write_text(resolved, encoding="utf-8")
    L.seed_everything(config.seed, verbose=False)
    on_gpu = torch.cuda.is_available() and config.trainer["accelerator"] in ("auto", "gpu", "cuda")
    dtype = "bfloat16" if config.dtype == "auto" and on_gpu else config.dtype
    model, tokenizer = load_model(config.model, config.revision, dtype, "cpu", config.attn)
    attach(model)
    adapter = None
    if (lora := config.lora) is not None:
        adapter = Adapter(lora.rank, lora.alpha, lora.targets)
        adapters.add(model, adapter)
    data = Data(config, tokenizer, context_length(model))
    assert config.policy is not None
    description = describe_model(model)
    if trained_for not in (None, description):
        raise UserError(
            f"output={config.output}: holds a run for {trained_for}, the model is {description}; "
            "overwrite=true starts anew"
        )
    spec = sized(config.policy.spec(), description["shapes"])
    policy = build_policy(spec, allow=sorted(modules_of(spec))).requires_grad_(True)
    policy.adapter = adapter
    module = Distillation(
        model,
        policy,
        lora_lr=lora.lr if lora is not None else 0.0,
        steps=config.trainer["max_steps"],
        keep=config.keep,
        keep_range=config.keep_range,
        students=config.students,
        weights=config.weights,
        objective=config.objective,
        draw=config.draw,
        temperature=config.temperature,
        soft_steps=config.soft_steps,
        exploration=config.exploration,
        lr=config.lr,
        budget_lr=config.budget_lr,
        chunk_size=config.chunk_size,
        checkpointing=config.checkpointing,
        gradient_tokens=config.gradient_tokens,
        seed=config.seed,
        answers=Path(config.answers).expanduser() if config.answers else output / "answers",
        description={"format_version": FORMAT_VERSION, "policy": spec, "model": description, "training": training},
    )
    trainer = _trainer(config, output, training, step)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint if resume else None, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    except Preempted:
        if trainer.is_global_zero:
            raise
        return  # it is told once
    _finish(trainer, module, description, output)


def modules_of(spec: Any) -> set[str]:
    """Top-level modules of the classes that a policy's arguments name; whoever typed them allowed them."""
    if not isinstance(spec, Mapping):
        return set()
    own = {str(spec["class_path"]).split(".")[0]} if "class_path" in spec else set()
    return own.union(*(modules_of(value) for value in spec.values()))


def _prepare(output: Path, checkpoint: Path, config: TrainConfig, training: Mapping[str, Any]) -> bool:
    """Make the run's folder and say whether it holds a run that can be continued."""
    stored = output / "config.yaml"
    if config.overwrite:
        checkpoint.unlink(missing_ok=True)
    resume = checkpoint.is_file()
    if resume and not stored.is_file():
        raise UserError(
            f"output={config.output}: holds a checkpoint without its config.yaml; overwrite=true starts anew"
        )
    if resume and (changed := differing(yaml.safe_load(stored.read_text("utf-8")), training)):
        raise UserError(
            f"output={config.output}: holds a run with another {', '.join(changed)}; expected the same settings, "
            "another output=, or overwrite=true"
        )
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"output={config.output}: expected a folder that can be written ({error})") from None
    return resume


def _read(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Steps done, and the model they were done for."""
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return held["global_step"], held["learnkv"]["model"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"output={checkpoint}: cannot be continued ({reason}); overwrite=true starts anew") from None


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two runs differ and must not; a run that is older than a key has its default."""
    default = {key.name: key.default for key in fields(TrainConfig)}
    return [key for key in new if key not in MAY_CHANGE and old.get(key, default.get(key)) != new[key]]


def _trainer(config: TrainConfig, output: Path, training: Mapping[str, Any], resumed_at: int) -> L.Trainer:
    given = dict(config.trainer)
    given["strategy"] = Sharded() if given["strategy"] == "fsdp" else given["strategy"]
    accumulate = given["accumulate_grad_batches"]
    every = min(config.validate_every * bool(config.validation_batches) or given["max_steps"], given["max_steps"])
    loggers: list[Logger] = [CsvTable(output / "metrics.csv", resumed_at)]
    callbacks: list[L.Callback] = [
        ProgressLine(),
        Checkpoints(output / "checkpoints", config.save_every, config.save_minutes, every),
        *(given["callbacks"] or []),
    ]
    if config.wandb is not None:
        loggers.append(
            WandbLogger(
                name=config.wandb.name or output.resolve().name,
                project=config.wandb.project,
                entity=config.wandb.entity,
                save_dir=output,
                offline=config.wandb.mode == "offline",
                config=dict(training),
            )
        )
        callbacks.append(pictures.WandbTables())
    if given["accelerator"] == "auto" and torch.backends.mps.is_available():
        given["accelerator"] = "cpu"  # budgets are solved in float64, which Apple's GPUs do not have
    ours = {
        "logger": loggers,
        "callbacks": callbacks,
        "default_root_dir": output,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": every * accumulate,
        "use_distributed_sampler": False,
        "inference_mode": False,
        "log_every_n_steps": given["log_every_n_steps"] or 10,
        "gradient_clip_val": 1.0 if given["gradient_clip_val"] is None else given["gradient_clip_val"],
    }
    _quiet()
    return L.Trainer(**{**given, **ours})


def _quiet() -> None:
    """Leave out what Lightning says about itself and advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for advice in (
        "does not have many workers",
        "in eval mode at the start",
        "LeafSpec",
        "smaller than the logging",
        "not resumable",
        "returned a view tensor",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")


def _finish(trainer: L.Trainer, module: Distillation, model: Mapping[str, Any], output: Path) -> None:
    """Export the policy and say where everything is."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if math.isfinite(float(value))}
    metrics["parameter_share"] = parameter_share(module.policy, module.model)
    if not trainer.is_global_zero:
        return
    if module.policy.adapter is not None:
        module.policy.adapter = adapters.current_weights(module.model, module.policy.adapter)
    folder = save_policy(
        module.policy,
        output / "policy",
        model=model,
        budgets=module.budgets,
        training=module.description["training"],
        metrics=metrics,
    )
    pictures.log_policy(trainer, folder)
    pictures.draw(module, output)
    print(f"policy: {folder}\ncheckpoint: {output / 'checkpoints' / 'last.ckpt'}", file=sys.stderr)
