"""The predicted peak of a step is what a real one holds."""

from pathlib import Path

import pytest
from support.commands import memory
from support.models import build

from learnkv.cli.parser import parse
from learnkv.inference.models import describe_model, load_model
from learnkv.ops.attention_columns import reference as columns
from learnkv.persistence.policies import build_policy, fill_sizes
from learnkv.training.config import TrainConfig
from learnkv.training.memory.live_bytes import LiveBytes
from learnkv.training.memory.predict import CONTEXTS, STEP, largest_batch, predicted, step_of

AS_SHIPPED = """
policy:
  class_path: learnkv.Policy
  init_args:
    scorer:
      class_path: learnkv.scorers.LearnedScorer
      init_args: {base: {class_path: learnkv.scorers.Constant}, rank: 4, width: 4, window: 8, sampling: 0.3}
    allocator:
      class_path: learnkv.allocators.LearnedAllocator
      init_args: {base: {class_path: learnkv.allocators.Uniform}, by: scores}
"""
"""The policy of `config=learned`, smaller."""


@pytest.mark.parametrize("policy", ["on a heuristic", "as shipped"])
@pytest.mark.parametrize(
    "typed",
    [
        ["continuations=2"],
        ["continuations=8", "checkpointing=true"],
        ["checkpointing=true", "chunk_size=50", "students=3", "batch_size=1"],
        ["chunk_size=30", "gradient_tokens=64"],
    ],
)
def test_the_prediction_is_what_a_step_holds(
    words: list[str], folder: Path, typed: list[str], policy: str, tmp_path: Path
) -> None:
    keys = {word.split("=")[0] for word in typed} | {"lengths", "keep_range"}
    words = [word for word in words if word.split("=")[0] not in keys]
    if policy == "as shipped":
        (tmp_path / "tiny.yaml").write_text(AS_SHIPPED)
    config, _ = parse(TrainConfig, [*words, *typed, "lengths=100,200", "keep=0.2"], "train")
    model = load_model(str(folder))[0]
    built = build_policy(fill_sizes(config.policy.spec(), describe_model(model)["shapes"]), allow=["learnkv"])
    module = step_of(config, model, built.requires_grad_(True))
    one = largest_batch(config, 200, "cpu")
    with LiveBytes() as live:
        module.training_step(one, 0).backward()
    parts = predicted(config, kernels=False)
    step = parts[CONTEXTS] + parts[STEP]
    assert step == pytest.approx(live.peak, rel=0.01)
    assert parts["weights of the model"] == sum(4 * held.numel() for held in model.parameters())
    assert parts["what is trained, and its optimizer"] == 3 * sum(4 * held.numel() for held in built.parameters())


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_prompts_of_soft_caps_and_sinks_are_predicted(
    words: list[str], folder: Path, family: str, tmp_path: Path
) -> None:
    """Which sdpa does not read: prompts are read block by block."""
    build(family, vocab_size=128, num_hidden_layers=2, layer_types=["full_attention"] * 2).save_pretrained(tmp_path)
    load_model(str(folder))[1].save_pretrained(tmp_path)
    words = [word for word in words if word.split("=")[0] not in ("model", "lengths", "keep_range", "continuations")]
    config, _ = parse(TrainConfig, [*words, f"model={tmp_path}", "lengths=100,200", "keep=0.2"], "train")
    model = load_model(str(tmp_path))[0]
    assert model.config._attn_implementation == "eager"
    assert 0 < predicted(config)[STEP] < 2**22, "a kernel holds no logits"
    if family == "gpt-oss":  # on the meta device PyTorch multiplies experts in bfloat16 only
        return
    built = build_policy(fill_sizes(config.policy.spec(), describe_model(model)["shapes"]), allow=["learnkv"])
    module = step_of(config, model, built.requires_grad_(True))
    with LiveBytes() as live:
        module.training_step(largest_batch(config, 200, "cpu"), 0).backward()
    parts = predicted(config, kernels=False)
    assert parts[CONTEXTS] + parts[STEP] == pytest.approx(live.peak, rel=0.02)


def test_the_command_tells_the_parts_and_their_sum(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert memory([*words, "trainer.devices=4", "trainer.strategy=fsdp"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("peak of a process")
    assert len(lines) == 5


def test_prompts_that_do_not_fit_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in words if not word.startswith("lengths=")]
    assert memory([*words, "lengths=100,100000"]) == 2
    assert "lengths=100,100000: with continuations of 12 tokens" in capsys.readouterr().err.strip().splitlines()[-1]


REGRESSION = """
objective:
  class_path: learnkv.training.objectives.ScoreRegression
  init_args: {target: {class_path: learnkv.scorers.KVzip, init_args: {chunk: CHUNK}}, of: OF}
"""


@pytest.mark.parametrize("of", ["logits", "ranks"])
@pytest.mark.parametrize("chunk", [50, 96])
def test_the_second_reading_of_a_regression_step_is_predicted(
    words: list[str], folder: Path, tmp_path: Path, of: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "_by_head", lambda total: False)  # predicted is a GPU; a CPU takes less
    (tmp_path / "tiny.yaml").write_text(AS_SHIPPED)
    (tmp_path / "scores.yaml").write_text(REGRESSION.replace("CHUNK", str(chunk)).replace("OF", of))
    words = [word for word in words if not word.startswith("lengths=")]
    config, _ = parse(TrainConfig, [*words, f"config={tmp_path / 'scores.yaml'}", "lengths=100,140"], "train")
    model = load_model(str(folder), dtype="float32")[0]
    built = build_policy(fill_sizes(config.policy.spec(), describe_model(model)["shapes"]), allow=["learnkv"])
    module = step_of(config, model, built.requires_grad_(True))
    batch = largest_batch(config, 140, "cpu")
    with LiveBytes() as live:
        module.training_step(batch, 0).backward()
    parts = predicted(config, kernels=False)
    assert parts[CONTEXTS] + parts[STEP] == pytest.approx(live.peak, rel=0.01)


def test_a_second_reading_without_room_in_the_context_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.yaml").write_text(REGRESSION.replace("CHUNK", "96").replace("OF", "ranks"))
    words = [word for word in words if not word.startswith("lengths=")]
    assert memory([*words, f"config={tmp_path / 'scores.yaml'}", "lengths=100,200"]) == 2
    assert "the model's context is 256" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_hub_id_without_a_network_is_told_what_is_enough(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word for word in words if not word.startswith("model=")]
    assert memory([*words, "model=nobody/nothing"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("a folder with the model's config.json is enough")
    assert len(error.splitlines()) == 1
