"""Lightning's Trainer with the loggers and callbacks of a run."""

import logging
import uuid
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from learnkv.errors import UserError
from learnkv.formats.files import write_text
from learnkv.persistence.wandb_options import Wandb
from learnkv.training import slurm
from learnkv.training.callbacks import pictures
from learnkv.training.callbacks.checkpoints import Checkpoints
from learnkv.training.callbacks.fence import FencedLogger
from learnkv.training.callbacks.logs import CsvTable, LastStep
from learnkv.training.callbacks.optimiser import OptimiserMetrics
from learnkv.training.callbacks.progress import ProgressLine
from learnkv.training.config import TrainConfig
from learnkv.training.fsdp import Sharded
from learnkv.training.resuming import RunFolder

IRRELEVANT_WARNINGS = (
    "does not have many workers",
    "in eval mode at the start",
    "LeafSpec",
    "smaller than the logging",
    "not resumable",
    "returned a view tensor",
)


def build_trainer(config: TrainConfig, run: RunFolder, keys: Mapping[str, Any]) -> L.Trainer:
    """The trainer of a run: `config.trainer` with its own settings for checkpoints, validation and logging.

    Args:
        keys: all keys of the run as plain containers, for W&B.
    """
    given = config.trainer
    validation_steps = _validation_steps(config)
    loggers: list[Logger] = [
        FencedLogger(file, partial(CsvTable, run.path / file, run.step, timing), gives_up=False)
        for file, timing in (("metrics.csv", False), ("times.csv", True))
    ]
    callbacks: list[L.Callback] = [
        OptimiserMetrics(),
        ProgressLine(),
        LastStep(),
        Checkpoints(run.checkpoint.parent, config.save_every, config.save_minutes, validation_steps),
        *(given["callbacks"] or []),
    ]
    if config.wandb is not None:
        loggers.append(FencedLogger("W&B", partial(_wandb_logger, config.wandb, run, keys)))
        callbacks.append(pictures.WandbTables())
    fixed = {
        "strategy": Sharded() if given["strategy"] == "fsdp" else given["strategy"],
        "accelerator": _accelerator(given["accelerator"]),
        "logger": loggers,
        "callbacks": callbacks,
        "plugins": slurm.plugins(given["plugins"]),
        "default_root_dir": run.checkpoint.parent,  # where Lightning looks for requeue checkpoints
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": validation_steps * given["accumulate_grad_batches"],
        "use_distributed_sampler": False,
        "inference_mode": False,
        "log_every_n_steps": given["log_every_n_steps"] or 10,
        "gradient_clip_val": 1.0 if given["gradient_clip_val"] is None else given["gradient_clip_val"],
    }
    _silence()
    try:
        return L.Trainer(**{**given, **fixed})
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise UserError(f"trainer: {str(error).splitlines()[0]}") from None


def _validation_steps(config: TrainConfig) -> int:
    """Optimiser steps between validations."""
    steps: int = config.trainer["max_steps"]
    return min(config.validate_every if config.data.validation_batches else 0, steps) or steps


def _wandb_logger(options: Wandb, run: RunFolder, keys: Mapping[str, Any]) -> WandbLogger:
    logger = WandbLogger(
        name=options.name or run.path.resolve().name,
        project=options.project,
        entity=options.entity,
        save_dir=run.path,
        offline=options.mode == "offline",
        id=_wandb_id(run),
        resume="allow",
        config=dict(keys),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning hands over None, which W&B warns of
    return logger


@rank_zero_only
def _wandb_id(run: RunFolder) -> str:
    """Id of the W&B run: a resumed run keeps its own."""
    file = run.path / "wandb_id.txt"
    if run.resumes and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    identity = uuid.uuid4().hex[:8]
    write_text(file, identity + "\n")
    return identity


def _accelerator(name: Any) -> Any:
    """`auto` without Apple's GPUs: budgets are solved in float64, which these do not have."""
    return "cpu" if name == "auto" and torch.backends.mps.is_available() else name


def _silence() -> None:
    """Turn off Lightning's banners, and warnings that do not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}.*")
