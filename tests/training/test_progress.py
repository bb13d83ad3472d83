"""The line of progress of a training."""

from pathlib import Path
from typing import Any

import pytest
from support.commands import train

from learnkv.training.callbacks import progress

STAGES = """
objective:
  class_path: learnkv.training.objectives.Stages
  init_args:
    objectives:
    - class_path: learnkv.training.objectives.ScoreRegression
      init_args: {target: {class_path: learnkv.scorers.KVzip}}
    - class_path: learnkv.training.objectives.ForwardKL
    steps: [2]
"""


def test_slow_steps_show_the_loss_of_the_step_that_ended(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every step has its line, the last one before another objective has its own loss in it."""
    monkeypatch.setattr(progress.ProgressLine.__init__, "__defaults__", (0.0,))
    stages = tmp_path / "stages.yaml"
    stages.write_text(STAGES)
    assert train([*words, f"config={stages}", "trainer.max_steps=4"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split("] ")[1].split()[0] for line in lines] == ["train/score_distance"] * 2 + ["train/kl"] * 2
