"""`learnkv memory config=NAME model=PATH [key=value …]`: the peak memory of a training run, predicted.

Takes the keys of `train.py`. A step is made on the meta device, with the longest context and the longest continuations,
and what its tensors hold is counted; of the model only its `config.json` is read. Validation, what CUDA and libraries
keep for themselves, and fragmentation come on top: leave a tenth. Steps through soft gates (`soft_steps`) are counted
as the others are; with kernels they hold less.
"""

import torch

from learnkv.errors import UserError
from learnkv.inference.models import context_length, describe_model, empty_model
from learnkv.persistence.policies import build_policy
from learnkv.persistence.size import sized
from learnkv.policy.policy import Policy
from learnkv.training.activation_checkpointing import decoder_layers
from learnkv.training.config import TrainConfig
from learnkv.training.data.batches import Batch
from learnkv.training.data.datamodule import lengths_within
from learnkv.training.memory.live_bytes import LiveBytes
from learnkv.training.memory.meta_device import on_meta_device
from learnkv.training.module import Distillation
from learnkv.training.run import modules_of

CONTEXTS, STEP = "keys and values of the contexts", "everything else of a step"


def report(config: TrainConfig, resolved: str) -> None:
    """Print what every process of the run holds at its peak."""
    parts = predicted(config)
    width = max(map(len, parts))
    whole = sum(parts.values())
    unit, of = ("GB", 1e9) if whole >= 1e9 else ("MB", 1e6)
    for name, size in [*parts.items(), ("peak of a process", whole)]:
        print(f"{name:<{width}}  {size / of:8.2f} {unit}")
    if config.objective is not None and config.objective.at(0).targets:
        print("Steps of the first objective are not counted: what it has the model read again depends on values.")


def predicted(config: TrainConfig, kernels: bool = True) -> dict[str, int]:
    """Bytes of each part at the peak of a process.

    Args:
        kernels: whether operations run as kernels, as they do on a GPU; else as their references.

    Raises:
        UserError: as for `step_of`; for prompts that do not fit into the model's context with their continuations.
    """
    assert config.policy is not None
    dtype = ("bfloat16" if kernels else "float32") if config.dtype == "auto" else config.dtype
    model = empty_model(config.model, config.revision, dtype)
    shapes = describe_model(model)["shapes"]
    spec = sized(config.policy.spec(), shapes)
    policy = build_policy(spec, allow=sorted(modules_of(spec))).to("meta").requires_grad_(True)
    longest = lengths_within(context_length(model), config)[1]
    module = step_of(config, model, policy)
    with on_meta_device(shapes["layers"], config.batch_size, kernels), LiveBytes() as live:
        module.training_step(batch(config, longest), 0).backward()
    trained = sum(one.numel() * one.element_size() for one in policy.parameters())
    bytes_of_token = 2 * shapes["layers"] * shapes["heads"] * shapes["head_dim"] * model.dtype.itemsize
    held = config.batch_size * longest * bytes_of_token
    several = _processes(config)
    return {
        "weights of the model": _weights(model, several if config.trainer["strategy"] == "fsdp" else 1),
        "what is trained, and its optimizer": 3 * trained + (trained if several > 1 else 0),
        CONTEXTS: held,
        STEP: live.peak - held,
    }


def step_of(config: TrainConfig, model: torch.nn.Module, policy: Policy) -> Distillation:
    """What makes the steps of a run, its students keeping the most that they may.

    Raises:
        UserError: for an objective (of several stages: the last one) with targets, as what they read depends on values.
    """
    keeps = sorted(config.keep or config.keep_range)
    drawn = [keeps[0], *[keeps[-1]] * (config.students - 1)]  # no draw of a sandwich keeps more
    objective = None if config.objective is None else config.objective.at(config.trainer["max_steps"])
    module = Distillation(
        model,
        policy,
        steps=1,
        keep=keeps,
        students=config.students,
        weights=config.weights,
        objective=objective,
        chunk_size=config.chunk_size,
        checkpointing=config.checkpointing,
        gradient_tokens=config.gradient_tokens,
    )
    if objective is not None and objective.targets:
        raise UserError(
            f"objective: what {type(objective).__name__} has the model read cannot be predicted; objective=null "
            "predicts distillation"
        )
    most = drawn if config.draw == "sandwich" else [keeps[-1]] * config.students
    module.keeps = lambda index: most  # type: ignore[method-assign]
    module.log = lambda *args, **keys: None
    return module


def batch(config: TrainConfig, longest: int, device: str = "meta") -> Batch:
    """The largest batch of a run: contexts and continuations as long as they may be, all tokens counted."""
    rows, new = config.batch_size * config.continuations, config.continuation_tokens
    prompts = torch.ones(config.batch_size, longest, dtype=torch.long, device=device)
    said = torch.ones(rows, new, dtype=torch.long, device=device)
    return Batch(0, prompts, torch.ones(prompts.shape, dtype=torch.long), said, said.clone(), said.bool())


def _processes(config: TrainConfig) -> int:
    devices = config.trainer["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return max(1, count) * int(config.trainer["num_nodes"])


def _weights(model: torch.nn.Module, processes: int) -> int:
    """Bytes of the weights that a process holds: all, or its share, what lies outside of layers, and two layers."""
    whole = sum(one.numel() * one.element_size() for one in model.parameters())
    if processes == 1:
        return whole
    layers = [sum(one.numel() * one.element_size() for one in part.parameters()) for part in decoder_layers(model)]
    return whole // processes + whole - sum(layers) + 2 * max(layers)
