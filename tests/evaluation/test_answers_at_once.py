"""Answers of several policies are written at once, and are those of each policy alone."""

from pathlib import Path

import pytest
from support.evaluation import compare, question_prompts, text_prompts
from support.models import Loaded

from learnkv.cache import side_by_side
from learnkv.evaluation import measured_jobs
from learnkv.evaluation.results import rows_of
from learnkv.evaluation.tasks.answers import Answers

NAMES = ("snapkv", "quest", "adakv", "h2o_decode", "streaming_llm")
COSTS = {"prefill_seconds", "decode_seconds", "peak_bytes"}


def test_records_are_those_of_one_policy_after_the_other(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = question_prompts(loaded[1], 6)
    apart = compare(loaded, prompts, tmp_path / "apart", NAMES, batch_size=2, family=Answers)
    joined: list[int] = []
    plain = side_by_side.side_by_side
    monkeypatch.setattr(measured_jobs, "side_by_side", lambda caches: joined.append(len(caches)) or plain(caches))
    at_once = compare(loaded, prompts, tmp_path / "at_once", NAMES, batch_size=2, family=Answers, answers=5)
    assert {*joined} == {2}  # two prompts of two jobs are four rows, six would be too many
    assert len(at_once) == len(apart) == 6 * 16
    for one, other in zip(at_once, apart, strict=True):
        assert {key: one[key] for key in one.keys() - COSTS} == {key: other[key] for key in other.keys() - COSTS}
    assert {one["policy"] for one in at_once if one["decode_seconds"] is None} == {"snapkv", "adakv", "streaming_llm"}
    speeds = {row["policy"]: row["tokens_per_second"] for row in rows_of(at_once) if row["keep"] in (1, 0.5)}
    assert [name for name, speed in speeds.items() if speed] == ["full", "quest", "h2o_decode"]


def test_text_is_read_against_the_full_cache_one_policy_after_the_other(loaded: Loaded, tmp_path: Path) -> None:
    records = compare(loaded, text_prompts(2), tmp_path, answers=100)
    assert all(one["decode_seconds"] is not None for one in records)
