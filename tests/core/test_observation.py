"""What a prefill captures, and what an observation has."""

import pytest
import torch
from support.observations import observe

from learnkv.core.observation import CaptureSpec, HiddenSample
from learnkv.errors import UserError
from learnkv.scorers.query_moments import QueryMoments
from learnkv.scorers.received import ReceivedAttention
from learnkv.scorers.repetition import Repetition


def test_a_union_of_specs_serves_both() -> None:
    one = CaptureSpec(8, statistics=frozenset({ReceivedAttention()}), sample=HiddenSample(5))
    other = CaptureSpec(32, extra_passes=frozenset({Repetition()}), statistics=frozenset({QueryMoments()}))
    both = one | other
    assert both == other | one == both | one
    assert (both.window, both.hidden, both.sample) == (32, False, HiddenSample(5))
    assert both.statistics == {ReceivedAttention(), QueryMoments()}
    assert both.extra_passes == {Repetition()}


@pytest.mark.parametrize(
    ("spec", "reads"),
    [
        (CaptureSpec(), False),
        (CaptureSpec(statistics=frozenset({ReceivedAttention()})), False),
        (CaptureSpec(hidden=True), True),
        (CaptureSpec(sample=HiddenSample()), True),
    ],
)
def test_hidden_states_are_captured_where_something_reads_them(spec: CaptureSpec, reads: bool) -> None:
    assert spec.reads_hidden == reads


def test_lengths_and_groups() -> None:
    obs = observe([9, 4], heads=2, group=3)
    assert obs.length.tolist() == [9, 4]
    assert obs.num_key_value_groups == 3
    assert obs.in_window(3).sum(-1).tolist() == [[3, 3]] * 2


def test_tokens_by_themselves() -> None:
    obs = observe([9])
    part = obs.of_tokens(torch.tensor([2, 5]), obs.hidden[:, [2, 5]])
    assert part.positions[0, 0].tolist() == [2, 5]
    assert torch.equal(part.keys, obs.keys[:, :, [2, 5]])
    assert part.statistics == {}


def test_what_is_missing_is_named() -> None:
    obs = observe([9])
    with pytest.raises(UserError, match="depend on how much will be kept"):
        _ = type(obs)(**{**vars(obs), "keep": None}).kept
    with pytest.raises(UserError, match="reads the output projection"):
        _ = type(obs)(**{**vars(obs), "project": None}).projection
