"""Shifted means against padding and pooling."""

import pytest
import torch
import torch.nn.functional as F

from learnkv.ops.shifted_mean import shifted_mean


@pytest.mark.parametrize(("width", "shift"), [(1, 0), (5, 0), (5, 2), (5, -2), (9, 4), (41, -20), (3, 1)])
@pytest.mark.parametrize("inside", [slice(0, 20), slice(6, 17), slice(3, 4)])
def test_it_is_a_mean_over_a_padded_row(width: int, shift: int, inside: slice) -> None:
    figures = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    among = torch.zeros(20, dtype=torch.bool)
    among[inside] = True
    padding = (width // 2 - shift, width // 2 + shift)
    want = F.avg_pool1d(F.pad(figures[:, inside], padding, mode="replicate"), width, stride=1)
    figures[:, ~among] = torch.nan
    got = shifted_mean(figures, among, torch.full((2,), width), torch.full((2,), shift))
    torch.testing.assert_close(got[:, inside], want)


def test_every_row_has_its_own_width_and_shift() -> None:
    figures = torch.arange(8.0).expand(3, 8)
    among = torch.ones(8, dtype=torch.bool)
    got = shifted_mean(figures, among, torch.tensor([1, 3, 1]), torch.tensor([0, 0, 2]))
    assert got[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert got[1].tolist() == pytest.approx([1 / 3, 1, 2, 3, 4, 5, 6, 20 / 3])
    assert got[2].tolist() == [2, 3, 4, 5, 6, 7, 7, 7]
