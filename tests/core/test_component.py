"""Components record their constructor arguments."""

import pytest

from learnkv.allocators import AdaKV, Pyramid
from learnkv.core.component import Component, class_path
from learnkv.policy.policy import Policy
from learnkv.scorers import HiddenScorer, SnapKV


def test_a_spec_has_all_arguments_and_those_of_components_within() -> None:
    spec = Policy(SnapKV(window=8), AdaKV(Pyramid(beta=5)), recent=3).spec()
    assert (spec["sinks"], spec["recent"], spec["decode"]) == (4, 3, None)
    assert spec["scorer"]["class_path"] == "learnkv.scorers.SnapKV"
    assert spec["scorer"]["init_args"]["window"] == 8
    assert spec["allocator"]["init_args"]["base"]["init_args"]["beta"] == 5


def test_sequences_become_lists() -> None:
    assert HiddenScorer(SnapKV(), reads=("keys", "values")).spec()["reads"] == ["keys", "values"]


@pytest.mark.parametrize(
    ("component", "path"), [(SnapKV(), "learnkv.scorers.SnapKV"), (Policy(None), "learnkv.policy.policy.Policy")]
)
def test_a_class_path_is_the_public_name_where_there_is_one(component: Component, path: str) -> None:
    assert class_path(component) == path
