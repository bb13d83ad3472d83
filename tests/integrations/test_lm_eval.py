"""lm-evaluation-harness with our model on three local tasks: generate_until, multiple choice, loglikelihood_rolling."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import run
from support.models import kept_mask
from torch import Tensor
from transformers import PreTrainedModel

from learnkv import load_model, load_policy, prefill
from learnkv.errors import UserError

MODULE = "learnkv.integrations.lm_eval"
HERE = Path(__file__).parent / "lm_eval_tasks"
TASKS = ("answers", "choices", "pages")
KEEP = 0.3


def test_without_lm_eval_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    assert main(["lm-eval", "model_args=policy=snapkv,keep=0.1", "tasks=answers"]) == 2
    assert "pip install learnkv[lm-eval]" in capsys.readouterr().err
