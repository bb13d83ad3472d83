"""The operations of training steps, counted on the meta device, and the time they take on an accelerator."""

import math
from collections.abc import Callable
from typing import Any

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.training.config import TrainConfig
from learnkv.training.data.batches import Batch
from learnkv.training.memory.accelerators import Accelerator
from learnkv.training.memory.meta_device import on_meta_device
from learnkv.training.memory.operations import OperationCount
from learnkv.training.module import Distillation

READING, ANSWERS, TEACHER, STUDENTS, BACKWARD = (
    "reading the prompts",
    "the model's own answers",
    "teacher on the continuations",
    "students on the continuations",
    "backward",
)
_PARTS = {"_prefill": READING, "_inputs": TEACHER, "_student_losses": STUDENTS}


def count_step(module: Distillation, batch: Batch, layers: int) -> OperationCount:
    """Operations of one step on the meta device by parts; of own answers those of one token.

    Args:
        module: runs the step; it can run no other one afterwards.
        batch: on the meta device.
        layers: number of compressed layers.
    """
    count = OperationCount()
    module.answers = _OneToken(module, count)  # type: ignore[assignment]
    for name, part in _PARTS.items():
        setattr(module, name, _counted(getattr(module, name), count, part))
    with on_meta_device(layers, len(batch.prompts), count=count), count, count.within(BACKWARD):
        module.training_step(batch, 0).backward()
    return count


def seconds_of(count: OperationCount, accelerator: Accelerator, generated: float) -> dict[str, float]:
    """Seconds of the parts of a step; those of own answers for `generated` tokens, the mean over all batches."""
    seconds = {part: accelerator.seconds(count.operations[part]) for part in (*_PARTS.values(), BACKWARD)}
    answers = generated * accelerator.seconds(count.operations[ANSWERS])
    return {READING: seconds.pop(READING), ANSWERS: answers, **seconds}


def mean_length(lengths: tuple[int, int]) -> int:
    """Mean of context lengths that are log-uniform between two bounds."""
    low, high = lengths
    return low if low == high else round((high - low) / math.log(high / low))


def generated_tokens(config: TrainConfig) -> float:
    """Tokens of own answers that a step generates on average, after each question."""
    weights = vars(config.data.mixture)
    share: float = weights["answers"] / sum(weights.values())
    return share * config.data.continuation_tokens


class _OneToken:
    """In place of the model's own answers: one token of each is generated and counted."""

    def __init__(self, module: Distillation, count: OperationCount) -> None:
        self.module, self.count = module, count

    def complete(self, model: Any, batch: Batch, cache: CompressedCache) -> Batch:
        """The batch itself; the answers of a batch are as long as its continuations."""
        token = batch._replace(
            continuations=batch.continuations[:, :1],
            continuation_mask=batch.continuation_mask[:, :1],
            counted=batch.counted[:, :1],
        )
        with torch.no_grad(), self.count.within(ANSWERS):
            self.module._outputs(cache.fork(), token)
        return batch


def _counted(method: Callable[..., Any], count: OperationCount, part: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with count.within(part):
            return method(*args)

    return run
