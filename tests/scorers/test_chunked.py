"""Scores of whole chunks."""

import dataclasses

import pytest
import torch
from support.observations import observe

from learnkv.errors import UserError
from learnkv.scorers import Chunked, KeyDiff, Knorm


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
def test_every_entry_has_the_score_of_its_chunk(reduce: str) -> None:
    obs, base = observe([23, 9, 1]), Knorm()
    scores, plain = Chunked(base, size=4, reduce=reduce)(obs), base(obs)
    how = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}[reduce]
    for row, length in enumerate((23, 9, 1)):
        for begin in range(0, length, 4):
            at = slice(23 - length + begin, 23 - length + min(begin + 4, length))
            expected = how(plain[row, :, at], -1, keepdim=True).expand(-1, at.stop - at.start)
            torch.testing.assert_close(scores[row, :, at], expected)


def test_chunks_are_those_of_the_prompt_where_entries_are_missing() -> None:
    """Position 5 of a head that has lost 4, 6 and 7 is a chunk by itself."""
    obs, base = observe([12]), Knorm()
    valid = obs.valid.clone()
    valid[0, 0, [4, 6, 7, 9]] = False
    scores, plain = Chunked(base, size=4)(dataclasses.replace(obs, valid=valid)), base(obs)
    assert scores[0, 0, 5] == plain[0, 0, 5]
    torch.testing.assert_close(scores[0, 0, 8], plain[0, 0, [8, 10, 11]].mean())
    torch.testing.assert_close(scores[0, 1, 5], plain[0, 1, 4:8].mean())


def test_chunks_of_one_are_the_scores_themselves() -> None:
    obs = observe([31, 8])
    assert torch.equal(Chunked(KeyDiff(), size=1)(obs)[obs.valid], KeyDiff()(obs)[obs.valid])


def test_chunks_have_a_size() -> None:
    with pytest.raises(UserError, match=r"size=0: expected at least one token per chunk"):
        Chunked(Knorm(), size=0)
