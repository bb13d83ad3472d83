"""`learnkv memory config=NAME model=PATH [key=value …]`: predicts the peak memory and the time of a training run.

Takes the keys of `train.py`. Steps run on the meta device: for the memory one of every objective with the longest
context and the longest continuations, whose tensors are counted; of the model only `config.json` is read. Validation,
memory that CUDA and libraries reserve, and fragmentation are not included: leave a tenth. Steps through soft gates
(`soft_steps`) are counted like the others; with kernels they need less. With `accelerator=NAME` operations are counted,
too, and their time and the number of GPUs are predicted.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from learnkv.errors import UserError
from learnkv.inference.extra_passes import check_pass
from learnkv.inference.models import describe_model, empty_model
from learnkv.persistence.policies import build_policy, fill_sizes, modules_of
from learnkv.policy.policy import Policy
from learnkv.training.activation_checkpointing import decoder_layers
from learnkv.training.config import TrainConfig
from learnkv.training.data.batches import Batch
from learnkv.training.data.datamodule import context_lengths
from learnkv.training.memory.accelerators import LAUNCH, Accelerator, AcceleratorSettings
from learnkv.training.memory.live_bytes import LiveBytes
from learnkv.training.memory.meta_device import on_meta_device
from learnkv.training.memory.operations import OperationCount
from learnkv.training.memory.step_time import count_step, generated_tokens, mean_length, seconds_of
from learnkv.training.module import Distillation
from learnkv.training.objectives import ForwardKL, Objective

WEIGHTS, TRAINED = "weights of the model", "what is trained, and its optimizer"
CONTEXTS, STEP = "keys and values of the contexts", "everything else of a step"
RESERVE = 1.1
"""Memory of a GPU over the predicted peak: validation, what CUDA keeps, fragmentation."""
MOST_GPUS = 64


@dataclass(frozen=True)
class MemoryConfig(TrainConfig):
    """Predict the peak memory of a training run, and with `accelerator=` its time and the number of GPUs.

    Args:
        time: accelerator and utilisation; its keys are typed without `time.`.
    """

    time: AcceleratorSettings = field(default=AcceleratorSettings(), metadata={"flat": True})


def report(config: MemoryConfig, resolved: str) -> None:
    """Print the peak memory of every process of the run, by parts; then the time and the GPUs."""
    run = EmptyRun(config)
    parts = run.memory()
    total = sum(parts.values())
    unit, divisor = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    _print({name: f"{size / divisor:8.2f} {unit}" for name, size in [*parts.items(), ("peak of a process", total)]})
    if (accelerator := config.time.chosen) is not None:
        _report_time(run, accelerator)
        count = gpus_needed(run, parts[CONTEXTS] + parts[STEP], accelerator)
        print(f"\nGPUs of {accelerator.memory:g} GB: {_gpu_advice(count)}")


def _report_time(run: "EmptyRun", accelerator: Accelerator) -> None:
    """Print the seconds of each objective's steps, by parts, and the hours of all steps."""
    config, length = run.config, mean_length(run.lengths)
    print(
        f"\nTime on {accelerator.name}: predicted, not measured. Assumed: {accelerator.utilisation:.0%} of "
        f"{accelerator.tflops:g} TFLOP/s (float32: {accelerator.tflops32:g}), {accelerator.bandwidth_utilisation:.0%} "
        f"of {accelerator.bandwidth:g} GB/s, operations one after another and none below {LAUNCH * 1e6:g} us. Not "
        "counted: validation, loading, the optimizer, communication between GPUs."
    )
    hours = 0.0
    for steps, objective, count in run.operations():
        seconds = seconds_of(count, accelerator, generated_tokens(config))
        hours += run.hours(steps * sum(seconds.values()))
        print(f"\n{steps} steps of {type(objective).__name__}, {config.data.batch_size} contexts of {length} tokens:")
        _print({part: f"{value:8.3f} s" for part, value in [*seconds.items(), ("a step", sum(seconds.values()))]})
    print(f"\nall {config.trainer['max_steps']} steps: {hours:.2f} h")


def _print(values: dict[str, str]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")


def predicted(config: TrainConfig, kernels: bool = True) -> dict[str, int]:
    """Bytes of each part at the peak of a process: `EmptyRun(config).memory(kernels)`."""
    return EmptyRun(config, kernels).memory(kernels)


class EmptyRun:
    """A training run on the meta device.

    Args:
        config: the run.
        kernels: whether the model is stored as on a GPU where `dtype=auto`.

    Raises:
        UserError: for prompts that do not fit into the model's context with their continuations or extra passes.
    """

    def __init__(self, config: TrainConfig, kernels: bool = True) -> None:
        assert config.policy is not None
        dtype = ("bfloat16" if kernels else "float32") if config.dtype == "auto" else config.dtype
        self.config = config
        self.model = empty_model(config.model, config.revision, dtype)
        self.shapes = describe_model(self.model)["shapes"]
        self.spec = fill_sizes(config.policy.spec(), self.shapes)
        self.lengths = context_lengths(self.model, config.data)

    def policy(self) -> Policy:
        """A new policy."""
        return build_policy(self.spec, allow=sorted(modules_of(self.spec))).to("meta").requires_grad_(True)

    def objectives(self) -> Iterator[tuple[int, int, Objective]]:
        """The first step, the number of steps, and the objective of each stage of the training."""
        schedule = self.config.distillation.objective or ForwardKL()
        stages = [schedule.at_step(step) for step in range(self.config.trainer["max_steps"])]
        for objective, steps in Counter(stages).items():
            yield stages.index(objective), steps, objective

    def memory(self, kernels: bool = True) -> dict[str, int]:
        """Bytes of each part at the peak of a process.

        Args:
            kernels: whether operations run as kernels, as on a GPU; otherwise as their references.
        """
        config, longest = self.config, self.lengths[1]
        batch_size = config.data.batch_size
        peak = 0
        for step, _, objective in self.objectives():
            self._check_passes(objective)
            module = step_of(config, self.model, self.policy(), step)
            with on_meta_device(self.shapes["layers"], batch_size, kernels), LiveBytes() as live:
                module.training_step(largest_batch(config, longest), 0).backward()
            peak = max(peak, live.peak)
        bytes_per_token = 2 * self.shapes["layers"] * self.shapes["heads"] * self.shapes["head_dim"]
        contexts = batch_size * longest * bytes_per_token * self.model.dtype.itemsize
        count = processes(config)
        shards = count if config.trainer["strategy"] == "fsdp" else 1
        return {**self.weights(count, shards), CONTEXTS: contexts, STEP: peak - contexts}

    def operations(self) -> Iterator[tuple[int, Objective, OperationCount]]:
        """Steps, objective, and the operations of a step of mean context length, for each stage of the training."""
        batch = largest_batch(self.config, mean_length(self.lengths))
        for step, steps, objective in self.objectives():
            self._check_passes(objective)
            module = step_of(self.config, self.model, self.policy(), step)
            yield steps, objective, count_step(module, batch, self.shapes["layers"])

    def hours(self, seconds: float) -> float:
        """Hours of steps that take so many seconds with one batch of each process."""
        return seconds * int(self.config.trainer["accumulate_grad_batches"]) / 3600

    def weights(self, processes: int, shards: int) -> dict[str, int]:
        """Bytes of what does not depend on the batch."""
        trained = _bytes_of(self.policy())
        return {WEIGHTS: _weights(self.model, shards), TRAINED: 3 * trained + (trained if processes > 1 else 0)}

    def _check_passes(self, objective: Objective) -> None:
        """Raise UserError for prompts that leave no room for the passes after them."""
        ids = torch.ones(1, self.lengths[1], dtype=torch.long)
        for target in objective.targets:
            for prompt_pass in Policy(target).capture_spec.extra_passes:
                for tokens in prompt_pass.passes(ids, ids.bool()):
                    check_pass(self.model, tokens, ids.bool())


def gpus_needed(run: EmptyRun, batch: int, accelerator: Accelerator) -> int | None:
    """The smallest power of two of GPUs that hold the run, with `trainer.strategy=fsdp` beyond 1; None: too many.

    Args:
        batch: bytes of contexts and step, which every process has.
    """
    room = accelerator.memory * 1e9 / RESERVE - batch
    counts = (2**power for power in range(MOST_GPUS.bit_length()))
    return next((count for count in counts if sum(run.weights(count, count).values()) <= room), None)


def _gpu_advice(count: int | None) -> str:
    if count == 1:
        return "1 is enough; trainer.devices=N for more (ddp), each of which needs as much memory"
    if count:
        return f"{count}: trainer.devices={count} trainer.strategy=fsdp"
    return (
        f"no number up to {MOST_GPUS} is enough, as contexts and step stay whole: shorter lengths=, a smaller "
        "batch_size=, chunk_size=4096, checkpointing=true"
    )


def step_of(config: TrainConfig, model: torch.nn.Module, policy: Policy, step: int | None = None) -> Distillation:
    """The module that runs a step of a run, with students at the largest kept fractions.

    Args:
        step: the step whose objective it has; None: the last one.

    Raises:
        UserError: for a policy with a precision, whose plans depend on values.
    """
    if policy.precision is not None:
        raise UserError("policy.precision: memory and time of training with it are not predicted; expected none")
    settings = config.distillation
    low, high = settings.keep_bounds
    last = config.trainer["max_steps"] if step is None else step
    objective = None if settings.objective is None else settings.objective.at_step(last)
    module = Distillation(model, policy, replace(settings, objective=objective, answers=None), steps=1)
    others = [high] * (settings.students - 1)
    keeps = [low if settings.keep_sampling == "sandwich" else high, *others]
    module.keeps = lambda index: keeps  # type: ignore[method-assign]
    module.log = lambda *args, **keys: None
    return module


def largest_batch(config: TrainConfig, longest: int, device: str = "meta") -> Batch:
    """The largest batch of a run: contexts and continuations of maximal length, all tokens counted."""
    data = config.data
    prompts = torch.ones(data.batch_size, longest, dtype=torch.long, device=device)
    rows = data.batch_size * data.continuations
    continuations = torch.ones(rows, data.continuation_tokens, dtype=torch.long, device=device)
    mask = torch.ones(prompts.shape, dtype=torch.long)
    return Batch(0, prompts, mask, continuations, continuations.clone(), continuations.bool())


def processes(config: TrainConfig) -> int:
    """Number of processes of a run."""
    devices = config.trainer["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, count) * int(config.trainer["num_nodes"])


def _weights(model: torch.nn.Module, processes: int) -> int:
    """Bytes of the weights per process: all, or its shard, the weights outside of layers, and two gathered layers."""
    total = _bytes_of(model)
    if processes == 1:
        return total
    layers = [_bytes_of(layer) for layer in decoder_layers(model)]
    return total // processes + total - sum(layers) + 2 * max(layers)


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
