"""What a step costs may be arranged otherwise, and its loss and gradients stay what they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.training import POOL, batch, distillation, gradients, moved
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.core.adapter import Adapter
from learnkv.core.observation import HiddenSample
from learnkv.inference import lora as adapters
from learnkv.inference.models import load_model
from learnkv.policy.policy import Policy
from learnkv.scorers import LearnedScorer, SnapKV
from learnkv.training.data.batches import Batch, BatchSampler
from learnkv.training.data.sources import Spans
from learnkv.training.memory.live_bytes import LiveBytes
from learnkv.training.objectives import ForwardKL, HiddenMSE, ReverseKL, WeightedSum


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_model(str(folder))[0]


def halves(one: Batch) -> list[Batch]:
    """Its prompts in two batches of the same number."""
    return [Batch(one.number, *(held.chunk(2)[row] for held in one[1:6])) for row in range(2)]


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes of the distinct storages that graphs save within the block; parameters are not counted."""
    seen: dict[Any, Any] = {}
    total = [0]

    def pack(held: Tensor) -> Tensor:
        store = held.untyped_storage()
        if not held.requires_grad or not held.is_leaf:
            seen.setdefault(store.data_ptr(), (store.nbytes(), held))  # kept alive, so that no address comes twice
        total[0] = sum(size for size, _ in seen.values())
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
        yield total


MANY = WeightedSum([ForwardKL(), ReverseKL(), HiddenMSE("all")], [1, 1, 0.5])


@pytest.mark.parametrize("asked", [{}, {"objective": MANY}, {"soft_steps": 1}])
@pytest.mark.parametrize("arranged", [{"chunk_size": 13}, {"checkpointing": True}])
def test_loss_and_gradients_are_the_same(
    model: PreTrainedModel, arranged: dict[str, int], asked: dict[str, int]
) -> None:
    keys = {"keep": (0.2, 1.0), "students": 2, "keep_sampling": "sandwich", "weights": "context", **asked}
    for number in range(2):
        loss, grads = gradients(distillation(model, moved(), **keys), batch(number))
        other, others = gradients(distillation(model, moved(), **keys, **arranged), batch(number))
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-7)
        for one, two in zip(grads, others, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)
        assert max(one.abs().max() for one in grads) > 1e-3


def test_checkpointing_computes_again_what_a_student_saw_that_evicts_on_the_way(model: PreTrainedModel) -> None:
    found = []
    for every, checkpointing in ((0, False), (4, False), (4, True)):
        policy = moved()
        policy.evict_interval = every
        found.append(gradients(distillation(model, policy, checkpointing=checkpointing), batch(1)))
    (plain, _), (loss, grads), (again, others) = found
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-7)
    assert (loss - plain).abs() > 1e-3
    for one, two in zip(grads, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)
    assert max(one.abs().max() for one in grads) > 1e-3


def test_checkpointing_computes_again_with_the_adapter_that_was_active(folder: Path) -> None:
    """The last student keeps everything and is read without the adapter; the gradient of the first needs it."""
    model, found = load_model(str(folder))[0], []
    adapter = Adapter(2, 4.0, ("q_proj", "down_proj"))
    adapters.add(model, adapter)
    for weight in adapters.weights(model, adapter).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        policy = moved()
        policy.adapter = adapter
        keys = {"keep": (0.2, 1.0), "students": 2, "keep_sampling": "sandwich"}
        found.append(gradients(distillation(model, policy, checkpointing=checkpointing, **keys), batch(1)))
    for one, two in zip(*(grads for _, grads in found), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)
    assert found[0][1][-1].abs().max() > 1e-4


def test_checkpointing_holds_what_layers_and_scorer_read_and_not_what_they_computed(model: PreTrainedModel) -> None:
    def held(*, keep: tuple[float] = (0.2,), **keys: Any) -> int:
        with saved_bytes() as total:
            distillation(model, moved(), keep=keep, **keys).training_step(one, 0)
        return total[0]

    one = batch(1)
    (rows, tokens), (prompts, slots) = one.continuations.shape, one.prompts.shape
    layers, hidden, ffn, heads = 2, 32, 64, 2
    entries = layers * prompts * heads * slots * 4  # bytes of one number per entry
    network = entries * (21 + 3 * 4)  # what the scorer's network reads and what its activation saves
    activations = layers * rows * tokens * 4 * (6 * hidden + 3 * ffn)
    logits = int(one.counted.sum()) * model.config.vocab_size * 4
    with_it, without = held(checkpointing=True), held()
    assert without > with_it + network + activations
    assert with_it < layers * rows * tokens * hidden * 4 + 8 * entries + 3 * logits
    assert held(checkpointing=True, students=2) - with_it < 1.1 * with_it


def test_parts_of_a_batch_one_after_the_other_have_the_gradient_of_the_whole(model: PreTrainedModel) -> None:
    """What `trainer.accumulate_grad_batches` adds up, and what processes average."""
    module = distillation(model, moved(), keep=(0.1, 0.4), students=2, weights="context", objective=MANY)
    whole, parts = batch(1), halves(batch(1))
    loss, grads = gradients(module, whole)
    other, others = gradients(module, *parts)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-7)
    for one, two in zip(grads, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)


def test_accumulated_batches_train_as_one_batch_does(model: PreTrainedModel) -> None:
    """Through the trainer: `accumulate_grad_batches=2` with a batch in halves, and the batch as it is."""
    weights, quiet = [], {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for accumulate in (1, 2):
        module = distillation(model, moved(), students=2, keep=(0.1, 0.4), steps=4)
        batches = [part for number in (1, 2, 3) for part in ([batch(number)], halves(batch(number)))[accumulate - 1]]
        trainer = L.Trainer(accelerator="cpu", max_steps=3, accumulate_grad_batches=accumulate, **quiet)
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(module, loader)
        weights.append([one.detach() for one in module.trained])
    for one, two, start in zip(*weights, moved().parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
        assert (one - start).abs().max() > 0.01


def test_a_student_that_keeps_everything_gives_every_parameter_a_gradient(model: PreTrainedModel) -> None:
    loss, grads = gradients(distillation(model, moved(), keep=(1.0,)), batch(1))
    assert abs(loss) < 1e-6
    assert all(torch.equal(one, torch.zeros_like(one)) for one in grads)


def test_a_model_in_bfloat16_has_predictors_in_float32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = moved()
    exact, _ = gradients(distillation(load_model(str(folder))[0], policy, keep=(0.2,)), batch(1))
    seen = []
    plan = type(policy).plan
    monkeypatch.setattr(type(policy), "plan", lambda *args, **keys: seen.append(plan(*args, **keys)) or seen[-1])
    rough, grads = gradients(distillation(load_model(str(folder), dtype="bfloat16")[0], policy, keep=(0.2,)), batch(1))
    assert {one.scores.dtype for one in seen} == {torch.float32}
    assert {one.wanted.dtype for one in seen} <= {torch.float32, torch.float64}
    assert {one.dtype for one in grads} == {torch.float32}
    assert all(one.isfinite().all() for one in grads)
    assert max(one.abs().max() for one in grads) > 1e-3
    assert rough.item() == pytest.approx(exact.item(), rel=0.1)


def test_each_batch_draws_the_tokens_that_hidden_states_are_held_of(model: PreTrainedModel) -> None:
    def policy() -> Policy:
        torch.manual_seed(0)
        made = LearnedScorer(SnapKV(window=8), 2, 2, 8, width=4, window=8, rank=2, hidden_size=32)
        made.weight_direct.data.normal_()
        return Policy(made)

    found: dict[Any, Any] = {}
    slots: list[Any] = []
    for tokens in (1000, 20, 20):
        module = distillation(model, policy(), gradient_tokens=tokens, seed=3)
        found[tokens], losses = [], []
        for number in (0, 1):
            loss, grads = gradients(module, batch(number))
            losses.append(loss)
            found[tokens].append(dict(zip([name for name, _ in module.policy.named_parameters()], grads, strict=True)))
            slots.append(module.hidden_sample(number).slots(100).tolist())
    assert slots[2:4] == slots[4:6]  # the same for a run that is resumed
    assert slots[2] != slots[3]
    assert {len(one) for one in slots[2:]} == {20}
    for all_tokens, some in zip(found[1000], found[20], strict=True):
        assert not torch.allclose(all_tokens.pop("scorer.project"), some.pop("scorer.project"), rtol=0.05)
        for name, one in all_tokens.items():
            torch.testing.assert_close(some[name], one, rtol=1e-3, atol=1e-6)


def test_what_scorers_read_is_not_copied_for_every_continuation(model: PreTrainedModel) -> None:
    policy = Policy(LearnedScorer(SnapKV(window=8), 2, 2, 8, width=4, window=8, rank=2, hidden_size=32))
    spans = Spans(POOL, count=16, tokens=4, cue=1)
    one = BatchSampler([(1.0, spans)], (200, 200), 1, 0.0, seed=1).batch(0)
    with LiveBytes() as live, torch.no_grad():
        module = distillation(model, policy, checkpointing=True)
        cache = module._read(one, [policy])
        before, live.peak = live.now, live.now
        module._outputs(cache.fork(), one)
    hidden = 2 * 200 * 32 * 4
    assert live.peak - before < 24 * hidden  # copies alone would be 16 times as much, and the attention as much again
    assert cache.compressed_layers()[0].capture.statistics[HiddenSample()].shape == (1, 200, 32)
