"""Normal scores: quantiles of ranks, ties, entries that are not there."""

import torch

from learnkv.ops.normal_scores import normal_scores


def test_values_are_the_quantiles_of_the_ranks_in_the_whole_row() -> None:
    scores = torch.tensor([[[10.0, -3.0], [0.5, 7.0]], [[1.0, 2.0], [3.0, 4.0]]])
    got = normal_scores(scores, torch.ones(2, 2, 2, dtype=torch.bool))
    quantile = torch.special.ndtri(torch.tensor([0.125, 0.375, 0.625, 0.875]))
    torch.testing.assert_close(got[0].flatten(), quantile[[3, 0, 1, 2]])
    torch.testing.assert_close(got[1].flatten(), quantile)


def test_ties_share_their_mean_rank_and_absent_entries_take_none() -> None:
    scores = torch.tensor([[[5.0, 1.0, 1.0, 9.0, 2.0]]])
    valid = torch.tensor([[[True, True, True, False, True]]])
    got = normal_scores(scores, valid)[0, 0, [0, 1, 2, 4]]
    torch.testing.assert_close(got, torch.special.ndtri(torch.tensor([0.875, 0.25, 0.25, 0.625])))
    assert torch.equal(got, normal_scores(scores[..., [0, 1, 2, 4]], valid[..., [0, 1, 2, 4]])[0, 0])


def test_every_order_survives_at_prompt_lengths_of_a_million() -> None:
    scores = torch.randperm(1_000_000, generator=torch.Generator().manual_seed(0)).float().view(1, 1, -1)
    got = normal_scores(scores, torch.ones_like(scores, dtype=torch.bool))
    assert (got.flatten()[scores.flatten().argsort()].diff() > 0).all()
    assert 0.999 < got.std() < 1.001
