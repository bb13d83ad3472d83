"""Precisions behind a policy's path, and of baselines."""

from pathlib import Path

import pytest

from learnkv import load_model
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.precisions import without_precision
from learnkv.evaluation.run import load_policies


def test_a_precision_follows_a_path_but_not_a_repository_or_a_file_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "mine@2.yaml"
    file.touch()
    assert without_precision("smollm2@K4V3") == ("smollm2", "K4V3")
    assert without_precision(f"{tmp_path}/run@4") == (f"{tmp_path}/run", "4")
    for path in ("smollm2", "owner/policy@main", str(file)):
        assert without_precision(path) == (path, None)


def test_trained_policies_stand_beside_baselines_at_precisions() -> None:
    config = EvalConfig(
        ckpt=("reference", "reference@K4V3"), baselines=("snapkv",), bytes=(0.1,), precision=(16, 4), tasks=("vt",)
    )
    policies = load_policies(config, load_model("reference")[0])
    precisions = {name: policy.precision_name for name, policy in policies.items()}
    assert precisions == {
        "learned": "16",
        "learned@K4V3": "K4V3",
        "full@4": "4",
        "snapkv@16": "16",
        "snapkv@4": "4",
    }


@pytest.mark.parametrize(
    ("path", "message"),
    [("reference@K5V3", "learned: precision=K5V3: expected 16"), ("referense@4", "referense")],
)
def test_what_is_mistyped_is_named(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_policies(EvalConfig(ckpt=(path,), bytes=(0.1,), tasks=("vt",)), load_model("reference")[0])
