"""`TrainConfig`: the keys of `train.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lightning.pytorch import Trainer

from learnkv.errors import UserError
from learnkv.persistence.wandb_options import Wandb
from learnkv.policy.policy import Policy
from learnkv.training.settings import DataSettings, DistillationSettings, check_not_negative, check_positive

UNSUPPORTED = {
    "fast_dev_run": False,
    "barebones": False,
    "overfit_batches": 0.0,
    "limit_train_batches": None,
    "limit_val_batches": None,
}
"""Arguments of Lightning's Trainer that must keep these values."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a KV-cache compression policy for one frozen model by distillation from its full cache.

    Args:
        policy: policy to train; sizes of the model are filled in.
        start: trained policy whose weights training begins with, by name: folder of a run or of an export, checkpoint,
            `reference` or `smollm2`; what it does not have begins as without it.
        model: hub id, folder, or `reference`.
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16, float16, or auto: as stored; on a CPU float32, or bfloat16 where it has that.
        attn: transformers' attention implementation.
        data: settings of the training data; its keys are typed without `data.`.
        distillation: settings of distillation; its keys are typed without `distillation.`.
        validate_every: steps between validations; 0: at the end only.
        save_every: steps between checkpoints.
        save_minutes: longest time between checkpoints.
        output: folder of the run; the same command resumes it.
        overwrite: start anew even if `output` has a run.
        seed: seed of all random numbers.
        trainer: arguments of Lightning's Trainer; `strategy=fsdp` shards the frozen model's weights.
        wandb: options of Weights & Biases; null for none.
    """

    policy: Policy | None = None
    start: str | None = None
    model: str = "reference"
    revision: str | None = None
    dtype: str = "auto"
    attn: str = "sdpa"
    data: DataSettings = field(default=DataSettings(), metadata={"flat": True})
    distillation: DistillationSettings = field(default=DistillationSettings(), metadata={"flat": True})
    validate_every: int = 0
    save_every: int = 100
    save_minutes: float = 10.0
    output: str = "runs/train"
    overwrite: bool = False
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"arguments_of": Trainer})
    wandb: Wandb | None = field(default=Wandb())

    def __post_init__(self) -> None:
        check_positive(vars(self), "save_every")
        check_not_negative(vars(self), "validate_every")
        _check_trainer(self.trainer)
        if self.policy is None:
            raise UserError(
                "policy: expected a policy with something to train; config=text and config=quickstart have one"
            )
        if self.data.validation_batches == 0 and not self.policy.allocator.static:
            raise UserError(
                "validation_batches=0: expected at least 1, as budgets depend on the prompt and the export contains "
                "their mean"
            )
        if self.distillation.soft_steps:
            _check_soft_steps(self.policy, self.distillation, self.trainer)


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    if trainer and trainer["max_steps"] < 1:
        raise UserError(f"trainer.max_steps={trainer['max_steps']}: expected the number of steps, at least 1")
    for key, default in UNSUPPORTED.items():
        if trainer.get(key, default) != default:
            raise UserError(
                f"trainer.{key}={trainer[key]}: expected {default}, as it changes which batches are read; shorter runs "
                "are trainer.max_steps= and validation_batches="
            )
    strategy, precision = trainer.get("strategy"), trainer.get("precision")
    if isinstance(strategy, str) and strategy not in ("auto", "fsdp") and not strategy.startswith("ddp"):
        raise UserError(f"trainer.strategy={strategy}: expected auto, ddp or fsdp (FSDP2)")
    if precision is not None and str(precision) not in ("32", "32-true"):
        raise UserError(
            f"trainer.precision={precision}: expected 32-true, as the policy is float32; the model's type is dtype="
        )


def _check_soft_steps(policy: Policy, settings: DistillationSettings, trainer: Mapping[str, Any]) -> None:
    """Raise UserError where no soft step has a gradient, or a part of the policy gets none in them."""
    count, objective = settings.soft_steps, settings.objective
    steps = range(min(count, trainer.get("max_steps", count)))
    if objective is not None and not any(objective.at_step(step).reads for step in steps):
        raise UserError(
            f"soft_steps={count}: expected 0 or more steps, as {type(objective).__name__} reads no continuation in "
            "these"
        )
    if policy.decode is not None and any(True for _ in policy.decode.parameters()):
        raise UserError(
            f"soft_steps={count}: expected 0, as soft gates evict nothing while tokens are added and "
            f"{type(policy.decode).__name__} as decode is trained by these evictions alone"
        )


def default_keys() -> dict[str, Any]:
    """Default of every key of `train.py`."""
    groups = (TrainConfig, DataSettings, DistillationSettings)
    return {key.name: key.default for group in groups for key in fields(group)}
