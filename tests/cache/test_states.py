"""The states of a cache layer, and the transitions between them."""

import dataclasses

import pytest
import torch

from learnkv.cache.states import Kept, Prompt
from learnkv.errors import UserError


def prompt() -> Prompt:
    """Two rows of three heads and eight slots; the second row has two slots of padding."""
    keys, values = torch.randn(2, 2, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, :2] = False
    return Prompt(keys, values, valid)


def test_states_are_frozen() -> None:
    read = prompt()
    for state in (read, read.seal()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            state.segment = None


def test_sealing_copies_nothing_and_keeps_the_prompt() -> None:
    read = prompt()
    kept = read.seal()
    assert kept.segment.keys.data_ptr() == read.keys.data_ptr()
    assert kept.segment.length.tolist() == [8] * 3 + [6] * 3
    assert kept.complete.entry_positions()[1, 0].tolist() == [-1, -1, *range(6)]


def test_an_evicted_prompt_is_not_complete() -> None:
    read = prompt()
    kept = Kept(read.seal().segment)
    with pytest.raises(UserError, match="already been compressed"):
        _ = kept.complete
    assert isinstance(kept.rows(torch.tensor([1]), 3), Kept)
    assert kept.rows(torch.tensor([1]), 3).segment.length.tolist() == [6] * 3


def test_continuations_share_a_relaxed_prompt_until_rows_are_selected() -> None:
    read = prompt()
    relaxed = read.relax(read.seal().segment, torch.rand(2, 3, 8))
    batch = torch.tensor([0, 0, 1, 1])
    repeated = relaxed.repeat(batch, 3, 2)
    assert repeated.complete is read
    assert repeated.copies == 2
    assert repeated.segment.length.tolist() == [8] * 6 + [6] * 6
    selected = repeated.rows(torch.tensor([3, 0]), 3)
    assert selected.copies == 1
    assert torch.equal(selected.complete.keys, read.keys[[1, 0]])
    assert torch.equal(selected.gates, relaxed.gates[[1, 0]])


def test_rows_of_a_merged_prompt_have_their_own_positions() -> None:
    positions = torch.arange(48).view(2, 3, 8)
    merged = dataclasses.replace(prompt(), positions=positions, rotated=positions + 1)
    row = merged.rows(torch.tensor([1]), 3)
    assert torch.equal(row.entry_positions(), positions[1:])
    assert torch.equal(row.key_positions(), positions[1:] + 1)
