"""What a training step holds at its peak against what `learnkv memory` predicts: `python -m benchmarks.step_memory`.

A step of distillation of `config=learned` on a model of 8B parameters: the prompt in chunks, three students, eight
continuations. Needs lightning, jsonargparse and pyyaml beside what the other scripts need.
"""

import importlib.util
import tempfile
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.decode import free
from benchmarks.results import Clock, Part, arguments, device
from benchmarks.shapes import LLAMA_8B
from benchmarks.timing import one_line
from learnkv import attach

TRIED = [(LLAMA_8B, 32768, 256), (LLAMA_8B, 8192, 256)]
"""Model, tokens of the prompt, tokens of a continuation."""
ARGUMENTS = (
    "config=learned batch_size=1 continuations=8 students=3 keep_sampling=sandwich keep_range=0.02,0.6 chunk_size=4096 "
    "checkpointing=true"
)


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    where = device(options.dry_run)
    part = Part(options.out, "step_memory", options.dry_run)
    clock = Clock(options.seconds)
    missing = [name for name in ("lightning", "jsonargparse", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        part.add(f"not installed: {', '.join(missing)}", kernel="train: memory of a step")
        part.finish()
        return part
    for shape, prompt, new in [(LLAMA_8B.tiny(), 200, 12)] if options.dry_run else TRIED:
        if clock.over():
            return part
        free()
        model = attach(shape.build(where, torch.float32 if options.dry_run else torch.bfloat16))
        about: dict[str, Any] = {
            "kernel": "train: memory of a step",
            "model": shape.name,
            "T": prompt,
            "new": new,
            "continuations": 8,
        }
        part.add(**about, **measure(model, prompt, new))
        del model
    part.finish()
    return part


def measure(model: PreTrainedModel, prompt: int, new: int) -> dict[str, Any]:
    """GB that a step allocates at its peak, weights and optimizer apart, and what is predicted."""
    from learnkv.cli.parser import parse
    from learnkv.inference.models import describe_model
    from learnkv.persistence.policies import build_policy, fill_sizes
    from learnkv.training.config import TrainConfig
    from learnkv.training.memory.predict import CONTEXTS, STEP, largest_batch, predicted, step_of

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        sizes = [f"model={folder}", f"lengths={prompt},{prompt}", f"continuation_tokens={new}"]
        config, _ = parse(TrainConfig, [*ARGUMENTS.split(), *sizes], "train")
        told = predicted(config, kernels=model.device.type == "cuda")
    assert config.policy is not None
    policy = build_policy(fill_sizes(config.policy.spec(), describe_model(model)["shapes"])).to(model.device)
    module = step_of(config, model, policy.requires_grad_(True))
    one = largest_batch(config, prompt, str(model.device))
    try:
        found = _peak(model.device, lambda: module.training_step(one, 0).backward())
    except torch.OutOfMemoryError as error:
        return {"failed": one_line(error)}
    step = told[CONTEXTS] + told[STEP]
    return {"measured_gb": found / 1e9, "predicted_gb": step / 1e9, "measured over predicted": found / step}


def _peak(where: torch.device, run: Any) -> int:
    """Bytes that `run` had allocated at most, beyond what there was."""
    if where.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    from learnkv.training.memory.live_bytes import LiveBytes

    with LiveBytes() as live:
        run()
    peak: int = live.peak
    return peak


if __name__ == "__main__":
    main()
