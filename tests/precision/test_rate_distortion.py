"""RDKV's choice of bits against a search over all of them, and its file."""

import itertools

import torch
from support.models import attached, tokens

from learnkv import load_policy, prefill
from learnkv.precision import RateDistortion


def test_no_other_choice_of_bits_within_the_bytes_loses_less() -> None:
    """Of all choices for six entries, at the bytes that each solution spends: some of a budget may be left over."""
    precision = RateDistortion()
    scores = torch.tensor([0.4, 0.02, 0.3, 0.001, 0.09, 0.05]).view(1, 1, 1, 6)
    cost = [0, *(level.entry_bytes(16) for level in precision.levels)]
    error = torch.tensor([1.0, *precision.distortion], dtype=torch.float64)
    solved = set()
    for budget in range(20, 6 * cost[-1], 7):
        plan = precision.shares(scores, torch.tensor([budget]), [16])
        counts = plan.counts[:, 0, 0, 0].tolist()
        levels = [0] * (6 - sum(counts)) + [m + 1 for m, count in enumerate(counts) for _ in range(count)]
        chosen = dict(zip(scores.flatten().argsort().tolist(), levels, strict=True))
        spent = sum(cost[level] for level in levels)
        assert spent <= budget
        if spent in solved:
            continue
        solved.add(spent)
        lost = sum(scores.flatten()[entry].item() * error[level].item() for entry, level in chosen.items())
        best = min(
            sum(score * error[level].item() for score, level in zip(scores.flatten().tolist(), choice, strict=True))
            for choice in itertools.product(range(5), repeat=6)
            if sum(cost[level] for level in choice) <= spent
        )
        assert lost <= best + 1e-9
    assert len(solved) > 10


def test_its_file_spends_the_bytes() -> None:
    policy = load_policy("rdkv")
    cache = prefill(attached("llama"), tokens(1, 57), policies=[policy])
    full = 2 * 2 * 16 * 2 * 3 * 57
    compressed = policy.compress(cache, bytes=0.2)
    steps = 3 * 2 * (2 * 16 + 32)  # every head has bytes of its own, of which less than a step is left
    assert 0.2 * full - steps < compressed.nbytes <= 0.2 * full
    # With 16 channels, two bits with their scales take 60 % of the bytes of four: no entry is worth less than four.
    assert len(compressed.compressed_layers()[0].state.tiers) == 3
