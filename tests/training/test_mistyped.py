"""A mistyped policy is one line that says what was meant."""

from pathlib import Path

import pytest
from support.commands import train

MISTYPED = {
    "a class": (
        "policy: {class_path: learnkv.Policy, init_args: {scorer: {class_path: learnkv.scorers.SnapVK}}}",
        "policy.scorer: learnkv.scorers has no SnapVK; did you mean SnapKV?",
    ),
    "its argument": (
        "policy: {class_path: learnkv.Policy, init_args: {scorer: {class_path: learnkv.scorers.SnapKV, "
        "init_args: {windov: 8}}}}",
        "policy.scorer.windov: unknown key; did you mean window?",
    ),
    "a policy's file": (
        "scorer: {class_path: learnkv.scorers.SnapKV}",
        "scorer.class_path: unknown key; did you mean policy.init_args.scorer?",
    ),
    "a class without its module": (
        "objective: ForwardKLL",
        "objective: expected the path of a class, got ForwardKLL; did you mean ForwardKL?",
    ),
    "a policy's path": ("policy: some/file.yaml", "policy: expected the path of a class, got some/file.yaml"),
}


@pytest.mark.parametrize("which", MISTYPED)
def test_what_was_meant_is_told(which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, told = MISTYPED[which]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert train([f"config={file}"]) == 2
    assert capsys.readouterr().err.strip() == f"error: config={file}: {told}"
