"""Operations that are counted of a step are those of a formula, and times follow from them."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import memory
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from learnkv.cli.parser import parse
from learnkv.errors import UserError
from learnkv.training.memory.accelerators import LAUNCH, Accelerator, AcceleratorSettings
from learnkv.training.memory.operations import Operation, OperationCount
from learnkv.training.memory.predict import EmptyRun, MemoryConfig, largest_batch
from learnkv.training.memory.step_time import (
    ANSWERS,
    BACKWARD,
    READING,
    STUDENTS,
    TEACHER,
    count_step,
    generated_tokens,
    mean_length,
    seconds_of,
)
from learnkv.training.module import Distillation

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 3, 256, 1024, 4, 2, 64, 512
QKV = HIDDEN * (HEADS + 2 * KV_HEADS) * DIM
LINEAR = LAYERS * (QKV + HEADS * DIM * HIDDEN + 3 * HIDDEN * INNER)
HEAD = HIDDEN * VOCABULARY
WIDTH = LAYERS * HEADS * DIM
CONTINUATIONS, NEW, KEEP = 4, 16, 0.25
SMALL_POLICY = """
policy:
  class_path: learnkv.Policy
  init_args:
    scorer:
      class_path: learnkv.scorers.LearnedScorer
      init_args: {base: {class_path: learnkv.scorers.Constant}, rank: 2, width: 2, window: 2}
    allocator:
      class_path: learnkv.allocators.LearnedAllocator
      init_args: {base: {class_path: learnkv.allocators.Uniform}, by: scores}
"""
SECOND_READING = """
objective:
  class_path: learnkv.training.objectives.ScoreRegression
  init_args: {target: {class_path: learnkv.scorers.KVzip}, of: logits}
"""
Run = Callable[..., EmptyRun]


@pytest.fixture
def small(tmp_path: Path) -> Run:
    """A run of a small Llama of which only the config exists."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=4096,
    )
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "small.yaml").write_text(SMALL_POLICY)
    (tmp_path / "second.yaml").write_text(SECOND_READING)

    def run(*typed: str) -> EmptyRun:
        words = [f"config={tmp_path / 'small.yaml'}", f"model={tmp_path / 'model'}", "trainer.max_steps=4"]
        words += [f"continuations={CONTINUATIONS}", f"continuation_tokens={NEW}", f"keep={KEEP}", "lengths=256"]
        words = [word.replace("SECOND", str(tmp_path / "second.yaml")) for word in (*words, *typed)]
        return EmptyRun(parse(MemoryConfig, words, "train")[0])

    return run


def products(run: EmptyRun) -> dict[str, int]:
    """Operations in products of matrices by parts."""
    ((_, _, count),) = run.operations()
    return {part: sum(each.flops for each in operations) for part, operations in count.operations.items()}


def formula(length: int, batch: int, students: int) -> dict[str, float]:
    """The same, the policy's own excepted."""
    tokens = batch * CONTINUATIONS * NEW
    both = students * tokens
    backward = both * (2 * (LINEAR - QKV / LAYERS + HEAD) + WIDTH * (6 * KEEP * length + 4 * length + 10 * NEW))
    return {
        READING: batch * (length * (2 * LINEAR + 2 * WIDTH * (length + 1)) + 2 * HEAD),
        TEACHER: tokens * (2 * (LINEAR + HEAD) + 4 * WIDTH * (length + NEW)),
        STUDENTS: both * (2 * (LINEAR + HEAD) + 4 * WIDTH * (KEEP * length + NEW)),
        BACKWARD: backward,
        ANSWERS: tokens / NEW * (2 * (LINEAR + HEAD) + 4 * WIDTH * (length + 1)),
    }


@pytest.mark.parametrize(("length", "batch", "students"), [(256, 2, 2), (512, 2, 2), (256, 4, 2), (256, 2, 4)])
def test_a_step_has_the_operations_of_the_formula(small: Run, length: int, batch: int, students: int) -> None:
    counted = products(small(f"lengths={length}", f"batch_size={batch}", f"students={students}"))
    expected = formula(length, batch, students)
    assert counted.keys() == expected.keys()
    for part, number in expected.items():
        assert counted[part] == pytest.approx(number, rel=0.04), part


def test_twice_as_much_of_a_setting_changes_its_parts(small: Run) -> None:
    before = products(small())
    batch, students, chunks = (products(small(key)) for key in ("batch_size=4", "students=4", "chunk_size=128"))
    for part, number in before.items():
        assert batch[part] == pytest.approx(2 * number, rel=1e-6), part
        assert students[part] == pytest.approx((2 if part in (STUDENTS, BACKWARD) else 1) * number, rel=1e-6), part
    assert chunks[READING] > before[READING]  # pairs that the mask of a second chunk hides are computed
    assert chunks[TEACHER] == before[TEACHER]
    recomputed = products(small("checkpointing=true"))[BACKWARD] - before[BACKWARD]
    last = HIDDEN * INNER * LAYERS  # a layer's last product is not needed again
    assert recomputed > 0.95 * 2 * (LINEAR - last) * 2 * 2 * CONTINUATIONS * NEW


def test_a_regression_step_reads_the_prompt_twice_and_no_continuation(small: Run) -> None:
    length = 256
    counted = products(small("config=SECOND", "batch_size=1"))
    second = length * (2 * LINEAR + 4 * WIDTH * 2 * length + 2 * WIDTH * 2 * length) + 2 * HEAD
    assert counted[READING] == pytest.approx(formula(length, 1, 1)[READING] + second, rel=0.02)
    assert counted[BACKWARD] < 0.01 * counted[READING]
    assert counted.get(TEACHER, 0) == 0


def test_each_stage_is_counted_for_its_steps(small: Run, tmp_path: Path) -> None:
    (tmp_path / "second.yaml").write_text(
        "objective: {class_path: learnkv.training.objectives.Stages, init_args: {steps: [3], objectives: "
        "[{class_path: learnkv.training.objectives.ScoreRegression, init_args: {target: {class_path: "
        "learnkv.scorers.KVzip}}}, {class_path: learnkv.training.objectives.ReverseKL}]}}"
    )
    run = small("config=SECOND", "trainer.max_steps=10", "trainer.accumulate_grad_batches=2")
    assert [(first, steps, type(each).__name__) for first, steps, each in run.objectives()] == [
        (0, 3, "ScoreRegression"),
        (3, 7, "ReverseKL"),
    ]
    assert run.hours(1800) == 1
    assert [steps for _, steps, _ in small("config=SECOND", "trainer.max_steps=2").objectives()] == [2]


def test_products_are_those_of_flop_counter_mode_on_real_tensors() -> None:
    layer, inputs = torch.nn.Linear(16, 32), torch.randn(3, 5, 16)
    with FlopCounterMode(display=False) as expected:
        torch.einsum("bti,bsi->bts", layer(inputs), layer(inputs)).sum().backward()
    with OperationCount() as count:
        torch.einsum("bti,bsi->bts", layer(inputs), layer(inputs)).sum().backward()
    assert sum(each.flops for each in count.operations[""]) == expected.get_total_flops() > 0


def test_bytes_are_what_operations_read_and_write() -> None:
    numbers, table = torch.zeros(8, 4), torch.zeros(100, 4)
    with OperationCount() as count:
        numbers.view(4, 8).T[1:]
        torch.empty(100)
        numbers + numbers[:1].expand(8, 4)
        table[torch.tensor([1, 2])]
        with count.kernel(77, torch.bfloat16):
            numbers @ numbers.T
    added, *_, taken, kernel = count.operations[""]
    assert (added.flops, added.moved) == (0, 128 + 128 + 128)
    assert taken.moved == 2 * 32
    assert kernel == Operation(2 * 8 * 8 * 4, 77, False)


def test_an_operation_takes_as_long_as_the_slower_of_arithmetic_and_memory() -> None:
    machine = Accelerator("x", 100, 10, 1000, 10, utilisation=0.5, bandwidth_utilisation=0.8)
    arithmetic, single, moving, tiny = (
        Operation(10**12, 10),
        Operation(10**12, 10, True),
        Operation(10, 8 * 10**9),
        Operation(1, 1),
    )
    assert machine.seconds([arithmetic]) == pytest.approx(0.02)
    assert machine.seconds([single]) == pytest.approx(0.2)
    assert machine.seconds([moving]) == pytest.approx(0.01)
    assert machine.seconds([arithmetic, moving, tiny]) == pytest.approx(0.03 + LAUNCH)


def test_own_answers_count_as_often_as_the_mixture_has_them(small: Run) -> None:
    run = small("mixture.text=3", "mixture.answers=1")
    assert generated_tokens(run.config) == NEW / 4
    ((_, _, count),) = run.operations()
    machine = Accelerator("x", 100, 10, 1000, 10)
    token, four = (seconds_of(count, machine, tokens) for tokens in (1, 4))
    assert four[ANSWERS] == 4 * token[ANSWERS] > 0
    assert {part: value for part, value in four.items() if part != ANSWERS} == {
        part: value for part, value in token.items() if part != ANSWERS
    }


def test_lengths_are_log_uniform() -> None:
    assert mean_length((512, 512)) == 512
    assert mean_length((1000, 4000)) == round(3000 / math.log(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accelerator": "h20"}, "tflops=, tflops32=, bandwidth=, gpu_memory= missing"),
        ({"tflops": 100.0}, "expected accelerator=NAME"),
        ({"accelerator": "l4", "bandwidth": -1.0}, "bandwidth=-1: expected more than 0"),
        ({"accelerator": "l4", "utilisation": (0.4, 1.4)}, "utilisation=0.4,1.4"),
    ],
)
def test_numbers_that_no_accelerator_has_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AcceleratorSettings(**settings)  # type: ignore[arg-type]


def test_given_numbers_replace_those_of_the_data_sheet() -> None:
    assert AcceleratorSettings().chosen is None
    chosen = AcceleratorSettings("l4", bandwidth=310.0, utilisation=(0.3, 0.6)).chosen
    assert chosen == Accelerator("l4", 121, 30.3, 310, 24, 0.3, 0.6)
    assert AcceleratorSettings("mine", 1.0, 2.0, 3.0, 4.0).chosen == Accelerator("mine", 1, 2, 3, 4)


def test_the_command_says_time_and_gpus(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert memory([*words, "accelerator=l4", "trainer.accumulate_grad_batches=3"]) == 0
    printed = capsys.readouterr().out
    assert "predicted, not measured" in printed
    assert "4 steps of ForwardKL, 2 contexts of 74 tokens:" in printed
    assert "GPUs of 24 GB: 1 is enough" in printed
    *_, small_one = (*words, "accelerator=x", "tflops=1", "tflops32=1", "bandwidth=1", "gpu_memory=0.000001")
    assert memory([*words, "accelerator=x", "tflops=1", "tflops32=1", "bandwidth=1", small_one]) == 0
    assert "no number up to 64 is enough" in capsys.readouterr().out


def test_a_counted_step_is_the_step_that_is_trained(small: Run) -> None:
    """The kernels' references run on meta tensors as on real ones: the same products in every part."""
    run = small("batch_size=2")
    model = type(run.model)(run.model.config).eval().requires_grad_(False)
    from learnkv.persistence.policies import build_policy
    from learnkv.training.memory.predict import step_of

    module = step_of(run.config, model, build_policy(run.spec).requires_grad_(True))
    assert isinstance(module, Distillation)
    batch = largest_batch(run.config, 256, "cpu")
    with FlopCounterMode(display=False) as real:
        module.training_step(batch, 0).backward()
    meta = count_step(
        step_of(run.config, run.model, run.policy()), largest_batch(run.config, 256), run.shapes["layers"]
    )
    counted = sum(each.flops for part, all_ in meta.operations.items() if part != ANSWERS for each in all_)
    full_attention = 2 * 256 * 2 * WIDTH * 257  # the CPU's attention is not in FlopCounterMode
    assert counted == pytest.approx(real.get_total_flops() + full_attention, rel=0.01)
