"""Operations of scoring, planning and quantising a prompt, over those of reading it.

`python -m benchmarks.compression_cost --out FILE` reads prompts with one layer of Llama-3.1-8B's sizes on the CPU and
compresses them to 5 % of their bytes with the parts of `config=smollm2-bytes`: one reading, scores of every entry, one
budget for entries and levels, codes. Products of matrices and attention count twice their multiplications; every
number that another operation writes counts once, a sorted one by the logarithm of its row.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.results import Part, arguments
from benchmarks.shapes import LLAMA_8B
from benchmarks.training_cost import operations
from learnkv import Policy, attach, prefill
from learnkv.cli.parser import parse
from learnkv.inference.models import describe_model
from learnkv.persistence.policies import build_policy, fill_sizes
from learnkv.training.config import TrainConfig

BYTES, MOST = 0.05, 0.02
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
_SORTS = {"sort", "argsort", "topk"}


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    part = Part(options.out, "compression_cost", options.dry_run)
    shape = LLAMA_8B.tiny() if options.dry_run else dataclasses.replace(LLAMA_8B, layers=1, vocabulary=1000)
    model = attach(shape.build(torch.device("cpu")).float())
    policy = learned(model)
    for prompt in (256,) if options.dry_run else (1024, 4096):
        part.add(kernel="compression", model=shape.name, layers=shape.layers, T=prompt, **cost(model, policy, prompt))
    part.finish()
    return part


def learned(model: Any) -> Policy:
    """The policy of `config=smollm2-bytes` for another model, before training."""
    config = parse(TrainConfig, ["config=smollm2-bytes"], "train")[0]
    return build_policy(fill_sizes(config.policy.spec(), describe_model(model)["shapes"])).requires_grad_(False)


@torch.no_grad()
def cost(model: Any, policy: Policy, prompt: int) -> dict[str, Any]:
    """Operations of a prefill, and over it those of what the policy captures, plans and stores."""
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    reading = counted(lambda: prefill(model, ids))
    capturing = counted(lambda: prefill(model, ids, policies=[policy])) - reading
    cache = prefill(model, ids, policies=[policy])
    planning = counted(lambda: policy.plan(cache, bytes=BYTES))
    storing = counted(lambda: policy.compress(cache, bytes=BYTES)) - planning
    return {
        "bytes": BYTES,
        "prefill": reading,
        "capturing over prefill": capturing / reading,
        "planning over prefill": planning / reading,
        "storing over prefill": storing / reading,
        "all over prefill": (capturing + planning + storing) / reading,
        "bound": MOST,
    }


def counted(run: Callable[[], Any]) -> float:
    """Operations of products, attention and everything else."""

    def both() -> None:
        with others:
            run()

    others = _Others()
    return operations(both) + others.operations


class _Others(TorchDispatchMode):
    """Counts the numbers that operations write which are neither products nor views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS or func.is_view:
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                row = tensor.shape[-1] if tensor.dim() else 1
                self.operations += tensor.numel() * (math.log2(max(row, 2)) if name in _SORTS else 1)
        return result


if __name__ == "__main__":
    main()
