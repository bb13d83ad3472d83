"""A whole model on the kernels: prefill, compression and generation give the tokens that the references give."""

import importlib

import torch
from kernels import DEVICE
from models import build, tokens

from learnkv import Policy, attach, generate, prefill
from learnkv.allocators.adakv import AdaKV
from learnkv.ops.dispatch import Impl, using
from learnkv.scorers.snapkv import SnapKV

KERNELS = {
    "window_scores": ["_split_normalisers", "_join_normalisers", "_reduce_weights", "_pool"],
    "select": ["_count_digits", "_count_kept", "_write"],
    "gather_kv": ["_gather"],
    "decode_attention": ["_attend", "_merge"],
}
STEPS = 6


def run(impl: Impl) -> tuple[list[list[int]], torch.Tensor]:
    model = attach(build("mistral").to(DEVICE))
    prompt, question = tokens(2, 60).to(DEVICE), tokens(2, 3, seed=1).to(DEVICE)
    with using(impl):
        cache = prefill(model, prompt, policy=Policy(SnapKV(window=8, kernel_size=3), AdaKV()), keep=0.3)
        said = generate(model, question, cache, max_new_tokens=STEPS)
    kept = [cache.kept_positions(*at).tolist() for at in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]]
    return [*kept, *said.tolist()], cache.budgets


def test_the_same_tokens_and_every_kernel_was_launched(monkeypatch):
    launched: dict[str, int] = {}
    for op, names in KERNELS.items():
        module = importlib.import_module(f"learnkv.ops.{op}.triton")
        for name in names:

            def note(*_: object, name: str = name, **__: object) -> None:
                launched[name] = launched.get(name, 0) + 1

            monkeypatch.setattr(getattr(module, name), "pre_run_hooks", [note])
    want, budgets = run("reference")
    assert not launched
    got, same = run("triton")
    assert got == want and torch.equal(budgets, same)
    assert len(set(budgets.flatten().tolist())) > 1  # the heads are unequal, or nothing ragged was tested
    assert set(launched) == {name for names in KERNELS.values() for name in names}
    layers = 2
    assert launched["_attend"] == layers * STEPS  # the question, then every token but the last
    assert launched["_gather"] == launched["_reduce_weights"] == layers
    assert launched["_write"] == 1
