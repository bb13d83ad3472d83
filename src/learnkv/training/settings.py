"""Settings of distillation and of training data. Their keys are typed without the group's name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from learnkv.core.observation import SAMPLED_TOKENS
from learnkv.data.retrieval import held_out_kinds
from learnkv.errors import UserError
from learnkv.policy.policy import TEMPERATURE
from learnkv.training.losses import Weighting
from learnkv.training.objectives import Objective

KeepSampling = Literal["stratified", "sandwich"]


@dataclass(frozen=True)
class Mixture:
    """Weights of the kinds of continuation; every batch has one kind.

    Args:
        retrieval: built-in episodes: facts, chains and passages to find in contexts made of docstrings.
        reconstruction: spans of the context, repeated.
        text: the next tokens of the text.
        answers: the model's own answers to questions about the text.
    """

    retrieval: float = 0.0
    reconstruction: float = 0.0
    text: float = 1.0
    answers: float = 0.0


@dataclass(frozen=True)
class DataSettings:
    """Settings of the training data.

    Args:
        text: a hub id, or text, jsonl or parquet files; the standard library's docstrings if not given.
        text_name: configuration of a data set on the hub.
        text_split: split of a data set on the hub.
        text_column: column with the text.
        streaming: tokenise the text while training, for data sets too large to be tokenised first.
        mixture: weights of the kinds of continuation.
        hold_out: RULER's task families (niah, vt, cwe, fwe, qa), single tasks, or kinds of built-in episodes that are
            excluded from training.
        lengths: shortest and longest context in tokens, log-uniform between them; 512,1024 if not given, or the upper
            half of the model's context where that is shorter.
        continuations: questions or spans per context.
        continuation_tokens: tokens of a text continuation, and at most of a span.
        query_aware: fraction of the batches whose question is read before compression.
        batch_size: contexts per batch.
        protect_after: words such as "password:" after which every student keeps tokens, as `prefill` does.
        validation_batches: batches that the KL of the deployed policy and of its base policy is measured on, at fixed
            kept fractions; 0 only for budgets that do not depend on the prompt.
        workers: processes that make batches; 0: the training process makes them.
    """

    text: tuple[str, ...] = ()
    text_name: str | None = None
    text_split: str = "train"
    text_column: str = "text"
    streaming: bool = False
    mixture: Mixture = Mixture()
    hold_out: tuple[str, ...] = ()
    lengths: tuple[int, int] | None = None
    continuations: int = 4
    continuation_tokens: int = 64
    query_aware: float = 0.25
    batch_size: int = 2
    validation_batches: int = 8
    workers: int = 0
    protect_after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive(vars(self), "continuations", "batch_size")
        check_not_negative(vars(self), "validation_batches", "workers")
        if self.lengths is not None:
            _check_range("lengths", self.lengths)
        if not 0 <= self.query_aware <= 1:
            raise UserError(f"query_aware={self.query_aware:g}: expected a fraction from 0 to 1")
        if self.continuation_tokens < 2:
            raise UserError(f"continuation_tokens={self.continuation_tokens}: expected at least 2")
        weights = vars(self.mixture)
        if min(weights.values()) < 0 or not any(weights.values()):
            raise UserError(f"mixture={weights}: expected weights of 0 or more, one of them above 0")
        held_out_kinds(self.hold_out)


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter trained beside the policy; it acts on tokens read after compression only.

    Args:
        rank: rank of each weight matrix's correction.
        alpha: corrections are scaled by alpha / rank.
        targets: names of the linear modules to adapt.
        lr: peak learning rate.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "o_proj")
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if min(self.rank, self.alpha, self.lr) <= 0 or not self.targets:
            raise UserError(
                f"lora.rank={self.rank} lora.alpha={self.alpha:g} lora.lr={self.lr:g} "
                f"lora.targets={','.join(self.targets)}: expected more than 0 of each, and at least one target"
            )


@dataclass(frozen=True)
class DistillationSettings:
    """Settings of distillation from the full cache.

    Args:
        lora: an adapter to train beside the policy; null for none.
        objective: loss to minimise: a class of `learnkv.training.objectives`; forward KL if not given.
        weights: token weights in the loss: `uniform`, or `context` for more weight on tokens that need the context.
        keep: kept fractions to sample from; log-uniform in `keep_range` if not given.
        keep_range: lowest and highest kept fraction.
        keep_sampling: `stratified` samples one fraction in each equal part of the range; `sandwich` always takes the
            lowest and the highest and samples the others between them.
        students: kept fractions per batch.
        temperature: temperature of the soft top-k at the first and at the last step.
        soft_steps: first optimiser steps in which students attend through soft gates and evict nothing (a warm start);
            as many as `trainer.max_steps` for the ablation. Steps of an objective without continuations count.
        level_exploration: probability that a head of a student chooses among some levels of precision only.
        gumbel_noise: scale of Gumbel noise on the scores of one student per batch, in temperatures; 0: none.
        lr: peak learning rate of networks.
        budget_lr: peak learning rate of budget logits.
        chunk_size: tokens of a context that are read at once; all if not given. Smaller chunks need less memory.
        checkpointing: activation checkpointing of continuations and of the scorer: less memory, a third more time.
        gradient_tokens: tokens per context whose hidden states are stored for the gradient of predictors that read
            them; of longer contexts a random sample per batch, with the same gradient in expectation.
        answers: folder that caches the model's own answers; below `output` if not given. Runs may share it.
    """

    lora: Lora | None = None
    objective: Objective | None = None
    weights: Weighting = "uniform"
    keep: tuple[float, ...] = ()
    keep_range: tuple[float, float] = (0.02, 0.6)
    keep_sampling: KeepSampling = "stratified"
    students: int = 2
    temperature: tuple[float, float] = (TEMPERATURE, TEMPERATURE)
    soft_steps: int = 0
    level_exploration: float = 0.3
    gumbel_noise: float = 0.0
    lr: float = 5e-3
    budget_lr: float = 0.1
    chunk_size: int | None = None
    checkpointing: bool = False
    gradient_tokens: int = SAMPLED_TOKENS
    answers: str | None = None

    def __post_init__(self) -> None:
        self._check_keep()
        check_positive(vars(self), "gradient_tokens", "students", "lr", "budget_lr")
        check_not_negative(vars(self), "soft_steps")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise UserError(f"chunk_size={self.chunk_size}: expected at least 1 token")
        if not 0 <= self.level_exploration <= 1:
            raise UserError(f"level_exploration={self.level_exploration:g}: expected a probability")
        if min(self.temperature) <= 0 or self.gumbel_noise < 0:
            first, last = self.temperature
            raise UserError(
                f"temperature={first:g},{last:g} gumbel_noise={self.gumbel_noise:g}: expected temperatures above 0, "
                "a scale of 0 or more"
            )
        if self.lora is not None and self.objective is not None and not self.objective.reads:
            raise UserError(f"lora: learns nothing from {type(self.objective).__name__}, which reads no continuation")

    def _check_keep(self) -> None:
        for key, fractions in (("keep", self.keep), ("keep_range", self.keep_range)):
            if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
                raise UserError(
                    f"{key}={wrong[0]:g}: expected fractions of the prompt's entries, above 0 and at most 1"
                )
        _check_range("keep_range", self.keep_range)
        if self.keep_sampling == "sandwich" and self.students < 2:
            raise UserError(
                f"students={self.students}: expected at least 2 for keep_sampling=sandwich, the lowest and the highest "
                "fraction"
            )

    @property
    def keep_bounds(self) -> tuple[float, float]:
        """Lowest and highest kept fraction of the training."""
        return (min(self.keep), max(self.keep)) if self.keep else self.keep_range


def check_positive(settings: Mapping[str, Any], *keys: str) -> None:
    """Raise UserError for a setting that is not above 0."""
    for key in keys:
        if settings[key] <= 0:
            raise UserError(f"{key}={settings[key]}: expected more than 0")


def check_not_negative(settings: Mapping[str, Any], *keys: str) -> None:
    """Raise UserError for a setting below 0."""
    for key in keys:
        if settings[key] < 0:
            raise UserError(f"{key}={settings[key]}: expected 0 or more")


def _check_range(key: str, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not 0 < low <= high:
        raise UserError(f"{key}={low},{high}: expected the lowest and the highest, in this order")
