"""When numbers and kept sets agree."""

import numpy as np
import torch
from torch import Tensor

from learnkv.ops.select import select
from learnkv.policy.policy import Policy


def budgets(policy: Policy, scores: Tensor, budget: float, layers: int = 1) -> Tensor:
    """Entries per head [L, B, H] as the allocator wishes them, before `fit`, at most all there are."""
    stacked = scores.expand(layers, *scores.shape)
    wanted = policy.allocator(stacked, None, torch.full((scores.shape[0],), budget, dtype=torch.float64))
    assert torch.equal(wanted, wanted.round()), "a table in print has whole numbers"
    return wanted.long().clamp(max=scores.shape[-1])


def kept(scores: Tensor, budget: Tensor) -> np.ndarray:
    """What `select` keeps of scores [..., S] with budget [...], as a mask."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[select(scores.flatten(0, -2), budget.flatten(), int(budget.sum()))] = True
    return mask.view_as(scores).numpy()


def assert_scores(got: np.ndarray, want: np.ndarray, rtol: float = 2e-4, atol: float = 1e-6) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def assert_kept(got: np.ndarray, ranking: np.ndarray, want: np.ndarray) -> None:
    """Kept masks `got` [..., S] against kept positions `want` [..., C] (-1: none); the first entries, as many as
    `ranking` [..., n] has, were ranked by it, the others are kept in any case.

    Which of several entries with the same score a top-k returns is its own affair, and max pooling makes many of them:
    entries above the lowest kept score must be there, those below must not, and the number must be the same.
    """
    ranked = ranking.shape[-1]
    assert got[..., ranked:].all()
    rows = zip(
        got[..., :ranked].reshape(-1, ranked),
        np.broadcast_to(ranking, (*want.shape[:-1], ranked)).reshape(-1, ranked).astype(np.float64),
        want.reshape(-1, want.shape[-1]),
        strict=True,
    )
    for mine, score, theirs in rows:
        number = np.count_nonzero((theirs >= 0) & (theirs < ranked))
        assert np.count_nonzero(theirs >= ranked) == got.shape[-1] - ranked
        assert_best(mine, score, number)


def assert_best(mine: np.ndarray, score: np.ndarray, number: int, margin: float = 1e-6) -> None:
    """The mask `mine` [n] holds `number` entries, none of which has a lower score than one that it leaves out."""
    assert np.count_nonzero(mine) == number
    if number == 0:
        return
    lowest = np.sort(score)[::-1][number - 1]
    apart = margin * abs(lowest)
    assert mine[score > lowest + apart].all(), "an entry with a higher score was evicted"
    assert not mine[score < lowest - apart].any(), "an entry with a lower score was kept"
