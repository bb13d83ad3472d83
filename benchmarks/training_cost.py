"""Operations of a training step and of a policy, in prefills: `python -m benchmarks.training_cost --out FILE`.

Counted where PyTorch dispatches them: products of matrices and attention, a causal one by the pairs that it reads. On
the reference model a step is made; at the sizes of Llama-3.1-8B one layer reads a prompt and plans on the meta device,
and the continuations are computed from the formula that `tests/bench/test_training_cost.py` compares with a count. A
step of the first stage of `config=learned`, which reads no continuation but has the prompt repeated, is counted too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import Part, arguments
from benchmarks.shapes import LLAMA_8B
from learnkv import Policy, attach, load_model, prefill
from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.inference.models import describe_model
from learnkv.persistence.policies import build_policy, fill_sizes
from learnkv.scorers import LearnedScorer, SnapKV

CONTINUATIONS, BOUND = 8, 90.0
KEEPS = (0.02, 0.11, 0.6)
"""Three students: the ends of a sandwich and the middle of the range on its logarithmic scale."""


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    part = Part(options.out, "training_cost", options.dry_run)
    model, _ = load_model("reference", device="cpu")
    layer = attach(dataclasses.replace(LLAMA_8B, layers=1).build(torch.device("meta")))
    for name, policy in (("as shipped", shipped), ("on SnapKV", on_snapkv)):
        for prompt, new in [(256, 16)] if options.dry_run else [(512, 32), (1024, 32), (2048, 32)]:
            found = step(model, policy(model), prompt, new)
            part.add(kernel="training step, counted", model="reference", policy=name, **found)
        for prompt in () if options.dry_run else (8192, 32768, 131072):
            found = computed(layer, policy(layer), prompt, 256, LLAMA_8B.layers)
            part.add(kernel="training step, computed", model=LLAMA_8B.name, policy=name, **found)
    for prompt in [256] if options.dry_run else [512, 1024, 2048]:
        found = regression(model, shipped(model), learned().distillation.objective, prompt)
        part.add(kernel="regression step, counted", model="reference", policy="as shipped", **found)
    part.finish()
    return part


def learned() -> Any:
    """`config=learned`."""
    from learnkv.cli.parser import parse
    from learnkv.training.config import TrainConfig

    return parse(TrainConfig, ["config=learned"], "train")[0]


def shipped(model: Any) -> Policy:
    """What `config=learned` trains: entry scores that read hidden states, and budgets that follow them."""
    return build_policy(fill_sizes(learned().policy.spec(), describe_model(model)["shapes"])).to(model.device)


def on_snapkv(model: Any) -> Policy:
    """Entry scores and budgets on SnapKV, both conditioned on the prompt."""
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    scorer = LearnedScorer(SnapKV(window=32), layers, heads, config.head_dim)
    return Policy(scorer, LearnedAllocator(Uniform(), layers, heads, conditioned=True)).to(model.device)


def step(model: Any, policy: Policy, prompt: int, new: int) -> dict[str, Any]:
    """A step of `Distillation`, counted; `new` tokens in every continuation."""
    ids, whole = _stepped(model, policy, None, prompt, new)
    prefilling, making, planning, _ = _read(model, policy, ids)
    return _told(prompt, new, whole, prefilling, making + planning)


def regression(model: Any, policy: Policy, objective: Any, prompt: int) -> dict[str, Any]:
    """The first step towards `objective`, counted, where that reads no continuation: scores of a slower scorer."""
    assert not objective.at_step(0).reads
    ids, whole = _stepped(model, policy, objective, prompt, 1)
    prefilling, *_ = _read(model, policy, ids)
    return {"T": prompt, "prefill": prefilling, "step over prefill": whole / prefilling}


def _stepped(model: Any, policy: Policy, objective: Any, prompt: int, new: int) -> tuple[torch.Tensor, float]:
    """Ids of a prompt, and operations of a step that trains on it."""
    from learnkv.training.data.batches import Batch
    from learnkv.training.module import Distillation
    from learnkv.training.settings import DistillationSettings

    settings = DistillationSettings(objective=objective, keep=KEEPS, students=len(KEEPS), keep_sampling="sandwich")
    module = Distillation(model, policy, settings, steps=10)
    module.keeps = lambda index: list(KEEPS)  # type: ignore[method-assign]
    module.log = lambda *args, **keys: None
    ids, said = torch.randint(3, 100, (1, prompt)), torch.randint(3, 100, (CONTINUATIONS, new))
    ones = torch.ones_like(said)
    batch = Batch(0, ids, torch.ones_like(ids), said, ones, ones.bool())
    return ids, operations(lambda: module.training_step(batch, 0).backward())


def computed(model: Any, policy: Policy, prompt: int, new: int, layers: int = 0) -> dict[str, Any]:
    """The same from sizes; the model may be on the meta device, and may stand for one of more `layers` like its own."""
    config = model.config
    times = layers / config.num_hidden_layers if layers else 1.0
    ids = torch.ones(1, prompt, dtype=torch.long, device=model.device)
    prefilling, making, planning, both = _read(model, policy, ids)
    head = 2 * config.vocab_size * config.hidden_size
    prefilling, making, planning, both = (
        (prefilling - head) * times + head,
        making * times,
        planning * times,
        both * times,
    )
    width = times * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    token = 2 * times * sum(one.numel() for one in model.model.layers.parameters()) + head
    teacher = token + 4 * width * (prompt + new)
    students = [2 * token + width * (10 * keep * prompt + 4 * prompt + 14 * new) for keep in KEEPS]
    whole = prefilling + making + CONTINUATIONS * new * (teacher + sum(students)) + len(KEEPS) * both
    return _told(prompt, new, whole, prefilling, making + planning)


def _read(model: Any, policy: Policy, ids: torch.Tensor) -> tuple[float, float, float, float]:
    """Operations of a prefill, of the policy's share in it, of a plan, and of a plan with its gradient."""
    prefilling = operations(lambda: prefill(model, ids))
    making = operations(lambda: prefill(model, ids, policies=[policy])) - prefilling
    cache = prefill(model, ids, policies=[policy])

    def both() -> None:
        plan = policy.plan(cache, keep=0.1)
        (plan.scores.sum() + plan.wanted.sum()).backward()

    with torch.no_grad():
        planning = operations(lambda: policy.plan(cache, keep=0.1))
    return prefilling, making, planning, operations(both)


def _told(prompt: int, new: int, whole: float, prefilling: float, policy: float) -> dict[str, Any]:
    bound = 1 + BOUND * new / prompt
    return {
        "T": prompt,
        "new": new,
        "continuations": CONTINUATIONS,
        "keeps": list(KEEPS),
        "prefill": prefilling,
        "step over prefill": whole / prefilling,
        "bound": bound,
        "policy over prefill": policy / prefilling,
    }


def operations(run: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter, _FullAttention() as full:
        run()
    return float(counter.get_total_flops() + full.operations)


class _FullAttention(TorchFunctionMode):
    """Counts attention to prompts by the pairs that are read.

    FlopCounterMode does not know the CPU's attention, and would count masked pairs.
    """

    operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key = args[:2]
        new, seen = query.shape[2], key.shape[2]
        pairs = new * seen - new * (new - 1) // 2
        self.operations += 4 * query.shape[0] * query.shape[1] * pairs * query.shape[3]
        return torch.empty_like(query) if query.is_meta else func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
