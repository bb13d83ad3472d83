"""A mistyped policy of one's own is one line that says what was meant."""

from pathlib import Path

import pytest

from learnkv.errors import UserError
from learnkv.persistence.policies import load_policy

MISTYPED = {
    "scorer: {class_path: learnkv.scorers.SnapVK}": "scorer: learnkv.scorers has no SnapVK; did you mean SnapKV?",
    "scorer: {class_path: learnkv.scorers.SnapKV, init_args: {windov: 8}}": (
        "scorer.windov: unknown key; did you mean window?"
    ),
    "scorer: {class_path: learnkv.scorers.SnapKV, init_args: {window: many}}": "scorer.window: expected int, got many",
    "scorr: {class_path: learnkv.scorers.SnapKV, init_args: {window: 8}}": "scorr: unknown key; did you mean scorer?",
    "scorr: 5": "scorr: unknown key; did you mean scorer?",
    "scorer: {class_path: not_here.Mine}": "scorer: no module not_here is installed or in the current folder",
}


@pytest.mark.parametrize("text", MISTYPED)
def test_what_was_meant_is_told(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_policy(file, allow=["not_here"])
    assert str(caught.value) == f"{file}: {MISTYPED[text]}"
