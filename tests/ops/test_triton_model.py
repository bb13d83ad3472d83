"""A whole model on the kernels: the tokens, and a student's gradients, that the references give."""

import importlib

import pytest
import torch
from support.kernels import DEVICE
from support.models import build, tokens

from learnkv import Policy, attach, continuation, generate, load_policy, prefill
from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.learned import LearnedAllocator
from learnkv.allocators.uniform import Uniform
from learnkv.ops.dispatch import Impl, using
from learnkv.pages import Quest
from learnkv.scorers.snapkv import SnapKV

KERNELS = {
    "window_scores": ["_split_normalisers", "_join_normalisers", "_reduce_weights", "_pool"],
    "select": ["_count_digits", "_count_kept", "_write"],
    "gather_kv": ["_gather"],
    "decode_attention": ["_attend", "_merge"],
}
PAGES = {
    "page_bounds": ["_enclose", "_score"],
    "select": ["_list_slots"],
    "decode_attention": ["_attend", "_merge"],
}
STEPS = 6


def run(impl: Impl, policy: Policy, steps: int = STEPS) -> tuple[list[list[int]], torch.Tensor]:
    model = attach(build("mistral").to(DEVICE))
    prompt, question = tokens(2, 60).to(DEVICE), tokens(2, 3, seed=1).to(DEVICE)
    with using(impl):
        cache = prefill(model, prompt, policy=policy, keep=0.3)
        said = generate(model, question, cache, max_new_tokens=steps, graph=False)
    if cache.budgets is None:
        return said.tolist(), torch.tensor(cache.read)
    kept = [cache.kept_positions(*at).tolist() for at in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]]
    return [*kept, *said.tolist()], cache.budgets


def counted(monkeypatch: pytest.MonkeyPatch, kernels: dict[str, list[str]]) -> dict[str, int]:
    """How often each of the kernels has been launched."""
    launched: dict[str, int] = {}
    for op, names in kernels.items():
        module = importlib.import_module(f"learnkv.ops.{op}.triton")
        for name in names:

            def note(*_: object, name: str = name, **__: object) -> None:
                launched[name] = launched.get(name, 0) + 1

            monkeypatch.setattr(getattr(module, name), "pre_run_hooks", [note])
    return launched


def test_the_same_tokens_and_every_kernel_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, policy = counted(monkeypatch, KERNELS), Policy(SnapKV(window=8, kernel_size=3), AdaKV())
    want, budgets = run("reference", policy)
    assert not launched
    got, same = run("triton", policy)
    assert got == want
    assert torch.equal(budgets, same)
    assert len(set(budgets.flatten().tolist())) > 1  # the heads are unequal, or nothing ragged was tested
    assert set(launched) == {name for names in KERNELS.values() for name in names}
    layers = 2
    assert launched["_attend"] == layers * STEPS  # the question, then every token but the last
    assert launched["_gather"] == launched["_reduce_weights"] == layers
    assert launched["_write"] == 1


def test_the_same_tokens_from_chosen_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, policy = counted(monkeypatch, PAGES), Policy(None, pages=Quest(page_size=4, dense_layers=0))
    steps = 4
    want, read = run("reference", policy, steps)
    assert not launched
    got, same = run("triton", policy, steps)
    assert got == want != run("reference", load_policy("full"), steps)[0]
    assert torch.equal(read, same)
    assert read.max() < 0.3
    layers = 2
    assert launched["_enclose"] == layers * steps  # the prompt, then every token but the last and those of the question
    assert launched["_score"] == launched["_list_slots"] == layers * (steps - 1)
    assert launched["_attend"] == layers * steps


def test_the_same_gradients_and_every_kernel_of_training_was_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = attach(build("mistral").to(DEVICE)), tokens(2, 5, seed=1).to(DEVICE)
    whole = prefill(model, tokens(1, 40).to(DEVICE), window=8)
    policy = Policy(SnapKV(window=8), LearnedAllocator(Uniform(), 2, 2)).to(DEVICE)
    training = {"mask_gradient": ["_query_gradient", "_entry_gradient", "_slot_gradient"]}
    launched = counted(monkeypatch, training | {"decode_attention": ["_attend"]})
    gradients = []
    for impl in ("reference", "triton"):
        student = policy.relax(whole, keep=0.3)
        student.batch_repeat_interleave(2)
        with using(impl):
            value = continuation(model, said, student).logsumexp(-1).sum()
        assert bool(launched) == (impl == "triton")
        gradients.append(torch.autograd.grad(value, list(policy.parameters())))
    for got, want in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert launched == dict.fromkeys([*training["mask_gradient"], "_attend"], 2)  # once in each layer


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_soft_caps_and_sinks_read_and_continue_on_the_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer that is compressed, and in a sliding one."""
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
    model, policy = attach(build(family, **kinds).to(DEVICE)), Policy(SnapKV(window=8))
    ids, new = tokens(2, 40).to(DEVICE), tokens(2, 3, seed=1).to(DEVICE)
    launched = counted(monkeypatch, {"decode_attention": ["_attend"]})
    logits = []
    for impl in ("reference", "triton"):
        with torch.no_grad(), using(impl):
            cache = policy.compress(prefill(model, ids, policies=[policy], chunk_size=25), keep=0.4)
            logits.append(continuation(model, new, cache))
        assert bool(launched) == (impl == "triton")
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    assert launched["_attend"] == 2 * 3, "two chunks and a question, in both layers"
