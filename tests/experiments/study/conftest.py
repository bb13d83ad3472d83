"""A study of a tiny model: one step of training, two prompts per task."""

from pathlib import Path

import pytest
import yaml
from evaluation.conftest import model_folder, text_file

from learnkv.data.ruler import NEW_TOKENS

__all__ = ["model_folder", "text_file"]

TRAINING = """
policy:
  class_path: learnkv.Policy
  init_args:
    scorer: {class_path: learnkv.scorers.SnapKV, init_args: {window: 32}}
    allocator:
      class_path: learnkv.allocators.LearnedAllocator
      init_args: {base: {class_path: learnkv.allocators.Uniform}, conditioned: true, window: 8}
lengths: [60, 90]
continuations: 2
continuation_tokens: 8
keep_range: [0.2, 0.6]
validation_batches: 1
wandb: null
trainer: {accelerator: cpu, max_steps: 1, log_every_n_steps: 1}
"""


@pytest.fixture
def words(model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed: the study's YAML names those of its trainings. Answers are short."""
    monkeypatch.setitem(NEW_TOKENS, "niah_single_1", 12)
    monkeypatch.setitem(NEW_TOKENS, "vt", 12)
    (tmp_path / "learned.yaml").write_text(TRAINING)
    (tmp_path / "learned-only.yaml").write_text("config: learned.yaml\nkeep: [0.2]\nstudents: 1\nbudget_lr: 5.0\n")
    keys = {
        "learned": str(tmp_path / "learned.yaml"),
        "single": [str(tmp_path / "learned-only.yaml")],
        "baselines": ["snapkv", "knorm", "random"],
        "training_text": [str(text_file)],
        "text": str(text_file),
        "model": str(model_folder),
        "tasks": ["niah_single_1", "vt"],
        "keep": [0.5, 0.2],
        "length": 400,
        "longer": [],
        "min_full_score": 0,
        "best": 1,
        "samples": {"evaluated": 3, "ablations": 2, "baselines": 1, "out_of_domain": 1, "text": 3},
    }
    file = Path(tmp_path / "tiny.yaml")
    file.write_text(yaml.safe_dump(keys))
    return [f"config={file}", f"output={tmp_path / 'study'}", f"out={tmp_path / 'docs'}", "commit=1234567"]
