"""One ranking over all layers and heads: what heads held at the start, and the gradient of the whole."""

import torch

from learnkv.ops.ranked_counts import margins, ranked_counts
from learnkv.ops.soft_topk import soft_topk

LAYERS, HEADS, SLOTS = 3, 2, 40
INF = torch.inf


def priors(seed: int, coarse: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [L, 2, H, S] with protected entries, the second row padded; ties everywhere if `coarse`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(LAYERS, 2, HEADS, SLOTS, generator=generator)
    if coarse:
        scores = scores.round()
    scores[..., -2:] = INF
    scores[:, 1, :, :9] = -INF
    held = torch.randint(2, SLOTS - 9 + 1, (LAYERS, 2, HEADS), generator=generator)
    held[0, :, 0], held[1, :, 0] = 2, torch.tensor([SLOTS, SLOTS - 9])  # nothing in question, and everything
    return scores, held, held.sum((0, 2))


def test_unmoved_scores_give_every_head_what_it_held() -> None:
    for seed in range(40):
        scores, held, total = priors(seed, coarse=seed % 2 == 0)
        for size in (1.0, 0.01, 30.0):
            same = scores * size
            assert torch.equal(ranked_counts(margins(same, same, held), total).long(), held), (seed, size)


def test_a_head_whose_scores_rise_gets_more_and_the_others_pay() -> None:
    prior, held, total = priors(1, coarse=False)
    scores = prior.clone()
    scores[2, :, 1] += 1.5
    got = ranked_counts(margins(scores, prior, held), total)
    assert torch.equal(got.sum((0, 2)).long(), total)
    assert (got[2, :, 1] > held[2, :, 1]).all()
    others = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    others[2, 1] = False
    assert (got.transpose(1, 2)[others] <= held.transpose(1, 2)[others]).all()


def test_counts_and_heads_together_have_the_gradient_of_one_soft_ranking() -> None:
    """Heads hold the same scores in another order, so that hard and soft counts agree and nothing is approximate."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(SLOTS, generator=generator, dtype=torch.float64)
    scores = torch.stack([one[torch.randperm(SLOTS, generator=generator)] for _ in range(LAYERS * HEADS)])
    scores = scores.view(LAYERS, 1, HEADS, SLOTS).requires_grad_()
    worth = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    total = torch.tensor([LAYERS * HEADS * 11])

    counts = ranked_counts(scores, total, 0.5)
    assert torch.equal(counts, torch.full_like(counts, 11.0))
    (parts,) = torch.autograd.grad((soft_topk(scores, counts, 0.5) * worth).sum(), scores)
    (whole,) = torch.autograd.grad((soft_topk(scores.flatten(), total[0], 0.5) * worth.flatten()).sum(), scores)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    (alone,) = torch.autograd.grad((soft_topk(scores, counts.detach(), 0.5) * worth).sum(), scores)
    assert (alone - whole).abs().max() > 0.01  # the counts matter
