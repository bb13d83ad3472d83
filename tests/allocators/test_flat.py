"""One ranking over all layers and heads."""

import torch

from learnkv.allocators import Flat

INF = torch.inf


def test_heads_get_what_they_have_among_the_best_of_the_model() -> None:
    scores = torch.tensor([[[[9.0, 1.0, 8.0], [7.0, 0.0, 0.1]]], [[[6.0, 5.0, 4.0], [0.3, 0.2, 0.1]]]])  # [2, 1, 2, 3]
    assert Flat()(scores, None, torch.tensor([1.25]))[:, 0].tolist() == [[2, 1], [2, 0]]
    scores[1, 0, 1, 2] = INF  # protected
    scores[0, 0, 0, 0] = -INF  # no entry
    assert Flat()(scores, None, torch.tensor([1.25]))[:, 0].tolist() == [[1, 1], [2, 1]]


def test_rows_are_ranked_each_for_itself() -> None:
    scores = torch.rand(3, 2, 4, 20, generator=torch.Generator().manual_seed(0))
    scores[:, 1] += 5
    got = Flat()(scores, None, torch.tensor([6.0, 3.5]))
    assert got.sum((0, 2)).tolist() == [72, 42]
    kept = scores[:, 0].flatten().sort(descending=True).values[:72]
    assert torch.equal(got[:, 0], (scores[:, 0] >= kept[-1]).sum(-1).double())


def test_kvzip_keeps_what_lies_strictly_above_the_last_that_fits() -> None:
    scores = torch.tensor([[[[0.9, 0.2, 0.5], [0.5, 0.7, -INF]]]])
    flat = Flat(rounding="kvzip")
    for places, kept in ((1, [0, 0]), (2, [1, 0]), (3, [1, 1]), (4, [1, 1]), (5, [3, 2]), (6, [3, 2])):
        wanted = flat(scores, None, torch.tensor([places / 2], dtype=torch.float64))
        assert wanted.flatten().tolist() == kept
