"""`learnkv memory config=NAME model=PATH [key=value …]`: predicts the peak memory of a training run.

Takes the keys of `train.py`. One step runs on the meta device, with the longest context and the longest continuations,
and the memory of its tensors is counted; of the model only `config.json` is read. Validation, memory that CUDA and
libraries reserve, and fragmentation are not included: leave a tenth. Steps through soft gates (`soft_steps`) are
counted like the others; with kernels they need less.
"""

from dataclasses import replace

import torch

from learnkv.errors import UserError
from learnkv.inference.models import describe_model, empty_model
from learnkv.persistence.policies import build_policy, fill_sizes, modules_of
from learnkv.policy.policy import Policy
from learnkv.training.activation_checkpointing import decoder_layers
from learnkv.training.config import TrainConfig
from learnkv.training.data.batches import Batch
from learnkv.training.data.datamodule import context_lengths
from learnkv.training.memory.live_bytes import LiveBytes
from learnkv.training.memory.meta_device import on_meta_device
from learnkv.training.module import Distillation

CONTEXTS, STEP = "keys and values of the contexts", "everything else of a step"


def report(config: TrainConfig, resolved: str) -> None:
    """Print the peak memory of every process of the run, by parts."""
    parts = predicted(config)
    width = max(map(len, parts))
    total = sum(parts.values())
    unit, divisor = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    for name, size in [*parts.items(), ("peak of a process", total)]:
        print(f"{name:<{width}}  {size / divisor:8.2f} {unit}")
    objective = config.distillation.objective
    if objective is not None and objective.at_step(0).targets:
        print("Steps of the first objective are not counted: the tokens of its extra passes depend on values.")


def predicted(config: TrainConfig, kernels: bool = True) -> dict[str, int]:
    """Bytes of each part at the peak of a process.

    Args:
        kernels: whether operations run as kernels, as on a GPU; otherwise as their references.

    Raises:
        UserError: as for `step_of`; for prompts that do not fit into the model's context with their continuations.
    """
    assert config.policy is not None
    dtype = ("bfloat16" if kernels else "float32") if config.dtype == "auto" else config.dtype
    model = empty_model(config.model, config.revision, dtype)
    shapes = describe_model(model)["shapes"]
    spec = fill_sizes(config.policy.spec(), shapes)
    policy = build_policy(spec, allow=sorted(modules_of(spec))).to("meta").requires_grad_(True)
    longest = context_lengths(model, config.data)[1]
    module = step_of(config, model, policy)
    batch_size = config.data.batch_size
    with on_meta_device(shapes["layers"], batch_size, kernels), LiveBytes() as live:
        module.training_step(largest_batch(config, longest), 0).backward()
    trained = _bytes_of(policy)
    bytes_per_token = 2 * shapes["layers"] * shapes["heads"] * shapes["head_dim"] * model.dtype.itemsize
    contexts = batch_size * longest * bytes_per_token
    processes = _processes(config)
    return {
        "weights of the model": _weights(model, processes if config.trainer["strategy"] == "fsdp" else 1),
        "what is trained, and its optimizer": 3 * trained + (trained if processes > 1 else 0),
        CONTEXTS: contexts,
        STEP: live.peak - contexts,
    }


def step_of(config: TrainConfig, model: torch.nn.Module, policy: Policy) -> Distillation:
    """The module that runs the steps of a run, with students at the largest kept fractions.

    Raises:
        UserError: for an objective (of several stages: the last one) with targets: their passes depend on values.
    """
    settings = config.distillation
    low, high = settings.keep_bounds
    objective = None if settings.objective is None else settings.objective.at_step(config.trainer["max_steps"])
    if objective is not None and objective.targets:
        raise UserError(
            f"objective: the extra passes of {type(objective).__name__} cannot be predicted; objective=null predicts "
            "distillation"
        )
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


def _processes(config: TrainConfig) -> int:
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
