"""What a training run consists of: the keys of `train.py`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lightning.pytorch import Trainer

from learnkv.core.observation import SAMPLED_TOKENS
from learnkv.data.retrieval import held_out_kinds
from learnkv.errors import UserError
from learnkv.policy.policy import TEMPERATURE, Policy
from learnkv.training.losses import Weighting
from learnkv.training.objectives import Objective
from learnkv.training.seeding import Draw


@dataclass(frozen=True)
class Mixture:
    """Weights of what follows a context; each batch is of one sort.

    Args:
        retrieval: built-in episodes: facts, chains and passages to find, in contexts made of docstrings.
        reconstruction: spans of the context, read once more.
        text: what comes next in the text.
        answers: the model's own answers to questions about the text.
    """

    retrieval: float = 0.0
    reconstruction: float = 0.0
    text: float = 1.0
    answers: float = 0.0


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter trained beside the policy; it acts on what is read after compression, and on nothing else.

    Args:
        rank: of the correction of every matrix.
        alpha: the correction is multiplied by alpha / rank.
        targets: names of the linear modules that are corrected.
        lr: its peak learning rate.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "o_proj")
    lr: float = 1e-3


@dataclass(frozen=True)
class Wandb:
    """What Weights & Biases is told.

    Args:
        mode: offline writes below the output folder and never touches the network.
        project: name of the project.
        name: name of the run; its output folder's if not given.
        entity: user or team, online.
    """

    mode: Literal["offline", "online"] = "offline"
    project: str = "learnkv"
    name: str | None = None
    entity: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Train a compression policy for one frozen model by distillation from its full cache.

    Args:
        policy: what is trained; sizes of the model are filled in.
        lora: an adapter to be trained beside it; null for none.
        model: hub id, folder, or `reference`.
        revision: branch, tag or commit of a hub id.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 on a GPU.
        attn: transformers' attention implementation.
        text: a hub id, or text, jsonl or parquet files; the standard library's docstrings if not given.
        text_name: configuration of a data set on the hub.
        text_split: split of a data set on the hub.
        text_column: column with the text.
        streaming: read the text while training, for what is too large to be tokenised first.
        mixture: what follows a context.
        hold_out: RULER's task families (niah, vt, cwe, fwe, qa), tasks of them, or kinds of built-in episodes of which
            nothing is trained on.
        answers: folder where the model's own answers are kept; below `output` if not given. Runs may share it.
        lengths: shortest and longest context in tokens, log-uniform between them; 512,1024 if not given, or the upper
            half of what a model of a shorter context can read.
        chunk_size: tokens of a context that are read at once, for less memory; all if not given.
        checkpointing: compute the activations of continuations and of the scorer again for the gradient instead of
            holding them: less memory, a third more time.
        gradient_tokens: tokens of a context whose hidden states are held, for the gradients of predictors that read
            them; of longer contexts so many are drawn for each batch, and gradients are the same on average.
        continuations: questions or spans of one context.
        continuation_tokens: tokens of a text continuation, and at most of a span.
        query_aware: fraction of the batches whose question is read before compression.
        keep: kept fractions to draw from; log-uniform in `keep_range` if not given.
        keep_range: lowest and highest kept fraction.
        students: kept fractions per batch.
        draw: `spread` draws one fraction in each equal part of the range, `sandwich` always the lowest and the highest
            and the others between them.
        objective: what is minimised: a class of `learnkv.training.objectives`; forward KL if not given.
        weights: of tokens in it: `uniform`, or `context` for tokens that need the context to count more.
        temperature: of the soft top-k that gradients come from, at the first and at the last step.
        soft_steps: optimiser steps at the beginning in which students read through soft gates, which evict nothing, not
            even later (`evict_interval`), instead of what is deployed: a warm start; as many as `trainer.max_steps` for
            the ablation. Steps of an objective that reads no continuation count, too.
        exploration: scale of Gumbel noise on the scores of one student per batch, in temperatures; 0: none.
        batch_size: contexts read at once.
        lr: peak learning rate of networks.
        budget_lr: peak learning rate of budget logits.
        validation_batches: for the KL of the deployed policy and of the heuristic it starts from, at fixed fractions;
            0 only for budgets that do not depend on the prompt.
        validate_every: steps between validations; 0: at the end only.
        save_every: steps between checkpoints.
        save_minutes: longest time between checkpoints.
        workers: processes that make batches; 0: none but the training's own.
        output: folder of the run; the same command continues what it holds.
        overwrite: start anew, whatever `output` holds.
        seed: of everything drawn.
        trainer: arguments of Lightning's Trainer; `strategy=fsdp` shares out the frozen model's weights.
        wandb: options of Weights & Biases; null for none.
    """

    policy: Policy | None = None
    lora: Lora | None = None
    model: str = "reference"
    revision: str | None = None
    dtype: str = "auto"
    attn: str = "sdpa"
    text: tuple[str, ...] = ()
    text_name: str | None = None
    text_split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    mixture: Mixture = Mixture()
    hold_out: tuple[str, ...] = ()
    answers: str | None = None
    lengths: tuple[int, int] | None = None
    chunk_size: int | None = None
    checkpointing: bool = False
    gradient_tokens: int = SAMPLED_TOKENS
    continuations: int = 4
    continuation_tokens: int = 64
    query_aware: float = 0.25
    keep: tuple[float, ...] = ()
    keep_range: tuple[float, float] = (0.02, 0.6)
    students: int = 2
    draw: Draw = "spread"
    objective: Objective | None = None
    weights: Weighting = "uniform"
    temperature: tuple[float, float] = (TEMPERATURE, TEMPERATURE)
    soft_steps: int = 0
    exploration: float = 0.0
    batch_size: int = 2
    lr: float = 5e-3
    budget_lr: float = 0.1
    validation_batches: int = 8
    validate_every: int = 0
    save_every: int = 100
    save_minutes: float = 10.0
    workers: int = 0
    output: str = "runs/train"
    overwrite: bool = False
    seed: int = 0
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"arguments_of": Trainer})
    wandb: Wandb | None = Wandb()

    def __post_init__(self) -> None:
        for keep in (*self.keep, *self.keep_range):
            if not 0 < keep <= 1:
                raise UserError(f"keep={keep:g}: expected fractions of the prompt's entries, above 0 and at most 1")
        for key in ("keep_range", "lengths"):
            low, high = getattr(self, key) or (1, 1)
            if not 0 < low <= high:
                raise UserError(f"{key}={low},{high}: expected the lowest and the highest, in this order")
        if min(self.temperature) <= 0 or self.exploration < 0:
            first, last = self.temperature
            raise UserError(
                f"temperature={first:g},{last:g} exploration={self.exploration:g}: expected temperatures above 0, "
                "a scale of 0 or more"
            )
        if self.draw == "sandwich" and self.students < 2:
            raise UserError(
                f"students={self.students}: draw=sandwich has at least 2, the lowest and the highest fraction"
            )
        if not 0 <= self.query_aware <= 1:
            raise UserError(f"query_aware={self.query_aware:g}: expected a fraction from 0 to 1")
        for key in ("gradient_tokens", "continuations", "students", "batch_size", "save_every", "lr", "budget_lr"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}={getattr(self, key)}: expected more than 0")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UserError(f"chunk_size={self.chunk_size}: expected at least 1 token")
        if self.continuation_tokens < 2:
            raise UserError(f"continuation_tokens={self.continuation_tokens}: expected at least 2")
        for key in ("soft_steps", "validation_batches", "validate_every", "workers"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: expected 0 or more")
        weights = vars(self.mixture)
        if min(weights.values()) < 0 or not any(weights.values()):
            raise UserError(f"mixture={weights}: expected weights of 0 or more, one of them above 0")
        if self.trainer and self.trainer["max_steps"] < 1:
            raise UserError(f"trainer.max_steps={self.trainer['max_steps']}: expected the number of steps, at least 1")
        strategy, precision = self.trainer.get("strategy"), self.trainer.get("precision")
        if isinstance(strategy, str) and strategy not in ("auto", "fsdp") and not strategy.startswith("ddp"):
            raise UserError(f"trainer.strategy={strategy}: expected auto, ddp or fsdp (its second version)")
        if precision is not None and str(precision) not in ("32", "32-true"):
            raise UserError(
                f"trainer.precision={precision}: expected 32-true, as what is trained is float32; the model's is dtype="
            )
        held_out_kinds(self.hold_out)
        if (lora := self.lora) is not None and (min(lora.rank, lora.alpha, lora.lr) <= 0 or not lora.targets):
            raise UserError(
                f"lora.rank={lora.rank} lora.alpha={lora.alpha:g} lora.lr={lora.lr:g} "
                f"lora.targets={','.join(lora.targets)}: expected more than 0 of each, and at least one target"
            )
        if lora is not None and self.objective is not None and not self.objective.reads:
            raise UserError(f"lora: learns nothing from {type(self.objective).__name__}, which reads no continuation")
        if self.policy is None:
            raise UserError(
                "policy: expected a policy with something to train; config=text and config=quickstart have one"
            )
        if self.validation_batches == 0 and not self.policy.allocator.static:
            raise UserError(
                "validation_batches=0: expected at least 1, as budgets depend on the prompt and what is exported says "
                "what they are on average"
            )
        if self.soft_steps:
            self._check_soft_steps(self.policy)

    def _check_soft_steps(self, policy: Policy) -> None:
        """Raise where soft steps would pass without anybody reading softly, or with a part that learns nothing."""
        steps = range(min(self.soft_steps, self.trainer.get("max_steps", self.soft_steps)))
        if self.objective is not None and not any(self.objective.at(step).reads for step in steps):
            raise UserError(
                f"soft_steps={self.soft_steps}: expected 0 or more steps, as {type(self.objective).__name__} reads no "
                "continuation in these"
            )
        if policy.decode is not None and any(True for _ in policy.decode.parameters()):
            raise UserError(
                f"soft_steps={self.soft_steps}: expected 0, as soft gates evict nothing while tokens are added and "
                f"{type(policy.decode).__name__} as decode learns from that alone"
            )
