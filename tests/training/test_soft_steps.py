"""Steps through soft gates at the beginning of a training: what they minimise, how many they are, what refuses them."""

from pathlib import Path

import pytest
import torch
from support.commands import train
from support.training import batch, distillation, mean_kl, moved
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy
from learnkv.training.module import Distillation

DECODED = """
policy:
  init_args:
    evict_interval: 4
    decode:
      class_path: learnkv.scorers.LearnedScorer
      init_args: {base: {class_path: learnkv.scorers.SnapKV}}
"""
REGRESSED = """
objective:
  class_path: learnkv.training.objectives.Stages
  init_args:
    objectives:
    - class_path: learnkv.training.objectives.ScoreRegression
      init_args: {target: {class_path: learnkv.scorers.KVzip}}
    - class_path: learnkv.training.objectives.ForwardKL
    steps: [3]
"""


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_model(str(folder))[0]


@pytest.mark.parametrize("interval", [0, 4])
def test_first_steps_read_through_soft_gates_and_later_ones_what_is_deployed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, interval: int
) -> None:
    """Soft gates evict nothing later, either; they spend what is asked."""
    policy, one, keep = moved(), batch(1), 0.2
    cache = prefill(model, one.prompts, one.prompt_mask, policies=[policy])
    student = policy.relax(cache, keep=keep, soft=True)
    mass = sum(layer.state.gates.sum((1, 2)) for layer in student.compressed_layers()) / (2 * 2)
    share = (mass / torch.tensor(cache.lengths)).detach()
    assert share.tolist() == pytest.approx(student.spent, rel=1e-2)

    def soft(cache: CompressedCache) -> CompressedCache:
        return policy.relax(cache, keep=keep, soft=True)

    expected = [mean_kl(model, one, soft), mean_kl(model, one, lambda cache: policy.compress(cache, keep=keep))]
    policy.evict_interval = interval
    module, told, losses = distillation(model, policy, soft_steps=1), {}, []
    module.log = lambda name, value, **keys: told.update({name: value})
    for step in range(2):
        monkeypatch.setattr(Distillation, "global_step", step)
        loss = module.training_step(one, 0)
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad.abs().max() > 0 for parameter in policy.parameters())
        policy.zero_grad()
        assert told["train/spent_over_asked"] == pytest.approx(share.mean().item() / keep, rel=1e-2)
    assert losses[0] == pytest.approx(expected[0], rel=1e-3)
    assert abs(losses[0] - expected[1]) > 0.02 * expected[1]
    assert abs(losses[1] - losses[0]) > 0.02 * losses[0]
    assert (losses[1] == pytest.approx(expected[1], rel=1e-3)) == (interval == 0)


@pytest.mark.parametrize(
    ("settings", "steps", "told"),
    [(DECODED, 2, "LearnedScorer as decode"), (REGRESSED, 3, "Stages reads no continuation")],
)
def test_soft_steps_that_teach_nothing_are_one_line(
    words: list[str], settings: str, steps: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "soft.yaml").write_text(settings)
    assert train([*words, f"config={tmp_path / 'soft.yaml'}", f"soft_steps={steps}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"error: soft_steps={steps}: expected 0")
    assert told in said[-1]


def test_optimiser_steps_are_soft_and_not_batches(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    soft, relax = [], Policy.relax
    monkeypatch.setattr(
        Policy, "relax", lambda self, *a, **k: soft.append(k.get("soft", False)) or relax(self, *a, **k)
    )
    typed = ["soft_steps=1", "validation_batches=1", "trainer.max_steps=2", "trainer.accumulate_grad_batches=2"]
    replaced = [word.split("=")[0] for word in typed]
    assert train([*(word for word in words if word.split("=")[0] not in replaced), *typed]) == 0
    assert soft[:8] == [True] * 4 + [False] * 4  # two students of each batch, then validation
