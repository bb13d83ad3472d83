"""Sampling by lossless decoding: the full cache's distribution, told apart from the draft's and from a wrong rule."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import attached, policy_for, tokens
from torch import Tensor

from learnkv import CompressedCache, continuation, generate, generate_lossless, prefill
from learnkv.inference.sampling import draw
from learnkv.inference.speculative_sampling import verified_samples


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


Outcomes = Counter[tuple[int, ...]]


def chi_square(counts: Outcomes, expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its degrees of freedom, of outcomes whose probabilities are `expected`."""
    total = sum(counts.values())
    assert counts.keys() <= {outcome for outcome, share in expected.items() if share > 0}
    terms = ((counts[outcome] - total * share) ** 2 / (total * share) for outcome, share in expected.items() if share)
    return sum(terms) / (sum(share > 0 for share in expected.values()) - 1)


LIMIT = 1.9
"""Of chi_square with 25 degrees of freedom or more: exceeded by chance once in more than a hundred runs."""


def test_sampled_tokens_have_the_full_caches_distribution() -> None:
    """End to end: pairs of tokens of many equal rows, beside the draft's own, which the test must tell from them."""
    model, rows, question = attached("llama"), 1200, tokens(1, 4, seed=8)
    settings: dict[str, Any] = {"do_sample": True, "top_k": 5, "temperature": 1.5}
    policy, full = policy_for("random", model), prefill(model, tokens(1, 40, seed=3))
    draft = policy.compress(full.fork(), keep=0.3)
    expected = joint(model, question, full, **settings)
    for cache in (full, draft):
        cache.batch_repeat_interleave(rows)
    asked = question.expand(rows, -1)
    by_draft = generate(model, asked, draft.fork(), max_new_tokens=2, seed=1, **settings)
    output = generate_lossless(model, asked, full, draft, max_new_tokens=3, draft_tokens=1, seed=1, **settings)
    counts = Counter(map(tuple, output.tokens[:, :2].tolist()))
    assert chi_square(counts, expected) < LIMIT
    drafted = Counter(outcome for outcome in map(tuple, by_draft.tolist()) if expected.get(outcome))
    assert drafted.total() < rows or chi_square(drafted, expected) > 2 * LIMIT, "the draft's samples would pass, too"


def joint(model: Any, question: Tensor, full: CompressedCache, **settings: Any) -> dict[tuple[int, ...], float]:
    """Probability of every pair of tokens that the full cache can sample."""

    def next_of(ids: Tensor) -> Tensor:
        best = (continuation(model, ids, full.fork())[0, -1] / settings["temperature"]).topk(settings["top_k"])
        return torch.zeros(97).index_copy(0, best.indices, best.values.softmax(-1))

    first = next_of(question)
    return {
        (a, b): float(first[a] * second)
        for a in first.nonzero().flatten().tolist()
        for b, second in enumerate(next_of(torch.cat([question, torch.tensor([[a]])], 1)).tolist())
        if second
    }


def rounds(verify: Callable[[Tensor, Tensor, Tensor], Tensor], count: int = 2, rows: int = 2) -> Outcomes:
    """Committed tokens of rounds of `count` drafted tokens, filled up from the target where a round was shorter."""
    generator = torch.Generator().manual_seed(5)
    found: Outcomes = Counter()
    for _ in range(1500):
        drafted = torch.stack([draw(PROPOSAL[i].expand(rows, -1), generator) for i in range(count)], 1)
        tokens_ = verify(drafted, PROPOSAL[:count].expand(rows, -1, -1), TARGET[: count + 1].expand(rows, -1, -1))
        while tokens_.shape[1] < count + 1:
            more = draw(TARGET[tokens_.shape[1]].expand(rows, -1), generator)
            tokens_ = torch.cat([tokens_, more.unsqueeze(-1)], 1)
        found.update(map(tuple, tokens_.tolist()))
    return found


TARGET = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
PROPOSAL = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]])


def test_rounds_of_several_tokens_and_rows_have_the_targets_distribution() -> None:
    generator, live = torch.Generator().manual_seed(6), torch.ones(2, dtype=torch.bool)
    expected = {
        outcome: float(torch.stack([TARGET[i, token] for i, token in enumerate(outcome)]).prod())
        for outcome in itertools.product(range(3), repeat=3)
    }

    def verified(drafted: Tensor, proposals: Tensor, target: Tensor) -> Tensor:
        return verified_samples(drafted, proposals, target, live, generator)[0]

    def resampled(drafted: Tensor, proposals: Tensor, target: Tensor) -> Tensor:
        """Wrong: a rejected token is drawn from the target instead of what it has above the proposal."""
        common = int(verified_samples(drafted, proposals, target, live, generator)[1].min())
        last = draw(target[:, common], generator)
        return torch.cat([drafted[:, :common], last.unsqueeze(-1)], 1)

    assert chi_square(rounds(verified), expected) < LIMIT
    assert chi_square(rounds(lambda drafted, *_: drafted), expected) > 2 * LIMIT
    assert chi_square(rounds(resampled), expected) > 2 * LIMIT
