"""Protected spans: kept by every policy, within the budget, per row, however prompts are read and compressed."""

import pytest
import torch
from support.models import EVICTING, LEARNED, attached, padded, policy_for, read, tokens
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, generate, load_cache, prefill, save_cache
from learnkv.allocators import AdaKV, LearnedAllocator
from learnkv.core.protection import Protection
from learnkv.errors import UserError
from learnkv.pages import Quest
from learnkv.policy.budget import Protected, protected_per_head
from learnkv.precision import LearnedPrecision, RateDistortion
from learnkv.scorers import Constant, Knorm, LearnedScorer, Random, SnapKV

SPANS = [[(10, 14), (20, 23)], [(5, 9)]]
LENGTHS = [50, 70]
SIZES = {"num_layers": 3, "num_heads": 2}


def prompt() -> tuple[Tensor, Tensor]:
    return padded([tokens(1, LENGTHS[0])[0], tokens(1, LENGTHS[1], seed=1)[0]])


def assert_kept(cache: CompressedCache, spans: list[list[tuple[int, int]]] = SPANS) -> None:
    heads = cache.compressed_layers()[0].heads
    for layer_idx in cache.compressible:
        for row, of_row in enumerate(spans):
            wanted = {position for begin, end in of_row for position in range(begin, end)}
            for head in range(heads):
                assert wanted <= set(cache.kept_positions(layer_idx, row, head).tolist())


@pytest.fixture(scope="module")
def cache() -> CompressedCache:
    """Read once for all methods."""
    return read(attached("llama"), *prompt(), protect=SPANS)


@pytest.mark.parametrize("name", [*EVICTING, *LEARNED])
def test_every_policy_keeps_them_within_the_budget(name: str, cache: CompressedCache) -> None:
    policy = policy_for(name, attached("llama"))
    small = policy.compress(cache.fork(), keep=0.3)
    assert_kept(small)
    layers = len(small.compressible)
    heads = layers * small.compressed_layers()[0].heads
    assert small.budgets is not None
    assert small.budgets.sum((0, 2)).tolist() == [round(0.3 * n * heads) for n in LENGTHS]


@pytest.mark.parametrize(
    "policy",
    [
        Policy(SnapKV(window=8), precision={"keys": 4, "values": 3}),
        Policy(SnapKV(window=8), precision=RateDistortion()),
        Policy(
            LearnedScorer(SnapKV(window=8), 3, 2, 16, width=4), precision=LearnedPrecision(num_layers=3, num_heads=2)
        ),
        Policy(Knorm(), AdaKV()),
    ],
)
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_bytes_and_tiers(policy: Policy, fraction: float) -> None:
    cache = prefill(attached("llama"), *prompt(), policies=[policy], protect=[[(10, 12)], [(5, 9)]])
    small = policy.compress(cache, bytes=fraction)
    assert_kept(small, [[(10, 12)], [(5, 9)]])
    assert all(
        size <= fraction * whole for size, whole in zip(small.row_nbytes(), small.row_full_nbytes(), strict=True)
    )


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_layerwise_and_chunked_reading_keep_the_same(chunk_size: int | None) -> None:
    policy = Policy(SnapKV(window=8))
    assert policy.reads_once
    at_once = prefill(attached("qwen3"), *prompt(), policy=policy, keep=0.3, protect=SPANS, chunk_size=chunk_size)
    whole = prefill(attached("qwen3"), *prompt(), policies=[policy], protect=SPANS)
    later = policy.compress(whole, keep=0.3)
    assert_kept(at_once)
    question = tokens(2, 3)
    logits = [continuation(attached("qwen3"), question, part) for part in (at_once, later)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    for layer_idx in later.compressible:
        assert torch.equal(*(part.kept_positions(layer_idx, 0, 0) for part in (at_once, later)))


def test_a_padded_row_is_the_row_alone() -> None:
    policy = Policy(SnapKV(window=8), AdaKV())
    ids, mask = prompt()
    both = policy.compress(prefill(attached("llama"), ids, mask, policies=[policy], protect=SPANS), keep=0.3)
    for row, length in enumerate(LENGTHS):
        alone = prefill(attached("llama"), ids[row : row + 1, -length:], policies=[policy], protect=SPANS[row])
        alone = policy.compress(alone, keep=0.3)
        for layer_idx in alone.compressible:
            for head in range(2):
                expected = both.kept_positions(layer_idx, row, head)
                assert torch.equal(alone.kept_positions(layer_idx, 0, head), expected)


def test_they_stay_while_tokens_are_generated() -> None:
    policy = Policy(SnapKV(window=8), evict_interval=8, decode=Random(seed=1))
    cache = policy.compress(prefill(attached("llama"), *prompt(), policies=[policy], protect=SPANS), keep=0.3)
    generate(attached("llama"), tokens(2, 3), cache, max_new_tokens=40)
    assert cache.lengths[0] > LENGTHS[0]
    assert_kept(cache)


def test_rows_forks_and_stored_caches_carry_them(tmp_path: object) -> None:
    policy = Policy(SnapKV(window=8))
    cache = prefill(attached("llama"), *prompt(), policies=[policy], protect=SPANS)
    loaded = load_cache(save_cache(cache, str(tmp_path)), attached("llama"))
    assert loaded.protection == cache.protection == Protection((((10, 14), (20, 23)), ((5, 9),)), ((), ()), 1.0)
    assert_kept(policy.compress(loaded, keep=0.3))
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    assert cache.protection is not None
    assert [len(spans) for spans in cache.protection.spans] == [1, 2, 1]


def test_a_budget_below_them_is_refused() -> None:
    for policy in (Policy(Knorm()), Policy(Knorm(), precision=4)):
        cache = prefill(attached("llama"), *prompt(), policies=[policy], protect=[(0, 20)])
        with pytest.raises(
            UserError, match=r"protect: 20 tokens of row 0 are protected, its budget keeps 10.0 entries"
        ):
            policy.compress(cache.fork(), keep=0.2)
    with pytest.raises(UserError, match="protect: 20 tokens of row 0"):
        prefill(attached("llama"), *prompt(), protect=[(0, 20)], policy=Policy(Knorm()), keep=0.2)
    cache = prefill(attached("llama"), *prompt(), policies=[Policy(Knorm())], protect=[(0, 20)])
    assert_kept(Policy(Knorm()).compress(cache.fork(), keep=0.4), [[(0, 20)], [(0, 20)]])
    assert_kept(Policy(Knorm()).compress(cache.fork(), budget=20), [[(0, 20)], [(0, 20)]])
    with pytest.raises(UserError, match="protect: 20 tokens"):
        Policy(Knorm(), precision=4).compress(cache, bytes=0.02)


def test_pages_evict_nothing() -> None:
    policy = Policy(None, pages=Quest(page_size=4))
    small = policy.compress(prefill(attached("llama"), *prompt(), policies=[policy], protect=SPANS), keep=0.3)
    assert_kept(small)


@pytest.mark.parametrize("soft", [False, True])
def test_students_keep_them(soft: bool) -> None:
    """In training, too: kept whatever is learned, without a gradient of their own, and others compete for the rest."""
    policy = Policy(LearnedScorer(SnapKV(window=8), 3, 2, 16, width=4), LearnedAllocator(AdaKV(), 3, 2))
    cache = prefill(attached("llama"), *prompt(), policies=[policy], protect=SPANS)
    student = policy.relax(cache, keep=0.3, soft=soft)
    plan = policy.plan(cache, keep=0.3)
    padding = max(LENGTHS) - LENGTHS[0]
    for begin, end in SPANS[0]:
        assert plan.kept[:, 0, :, padding + begin : padding + end].all()
        assert (plan.scores[:, 0, :, padding + begin : padding + end] == torch.inf).all()
    if not soft:
        assert_kept(student)
        small = policy.compress(cache.fork(), keep=0.3)
        question = tokens(2, 3)
        logits = [continuation(attached("llama"), question, part) for part in (student, small)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    loss = continuation(attached("llama"), tokens(2, 3), policy.relax(cache, keep=0.3, soft=soft)).square().mean()
    loss.backward()
    gradients = [weight.grad for weight in policy.parameters() if weight.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_counts_and_clipping() -> None:
    """Spans first; sinks and recent tokens get half of what they leave; nothing is counted twice."""
    spans = Protection((((0, 3), (90, 100)), ()), ((), ()))
    protected = protected_per_head(4, 8, [100, 100], [200, 200], 10, spans)
    assert list(protected.edges) == [3, 10]  # half of 20 - 13, and of 20
    assert list(protected.counts) == [13, 10]  # the 3 last ones are in a span
    assert protected_per_head(4, 8, [100, 9], [200, 80], 10) == Protected.of_edges([10, 4])
    assert list(protected_per_head(0, 8, [100], [200], 10, Protection(((),), ((),))).counts) == [8]


def test_anchors_get_no_more_than_their_share() -> None:
    after = tuple((begin, begin + 4) for begin in range(10, 90, 5))
    protection = Protection(((), ()), (after, ()), 0.25)
    protected = protected_per_head(2, 4, [100, 100], [400, 400], 10, protection)
    assert list(protected.counts) == [6 + 10, 6]
    assert protected.spans is not None
    assert protected.spans[0].nonzero()[:, 0].tolist() == [*range(10, 14), *range(15, 19), 20, 21]


def test_repeated_anchors_do_not_exhaust_the_budget() -> None:
    """An attack: 40 false anchors before the true one, whose value the policy itself scores highest."""
    false = tuple((begin, begin + 4) for begin in range(4, 164, 4))
    protection = Protection(((),), ((*false, (180, 184)),))

    class Scored(Constant):
        def forward(self, obs):  # type: ignore[no-untyped-def]
            return ((obs.positions >= 180) & (obs.positions < 184)).float()

    policy = Policy(Scored(), sinks=0, recent=2)
    ids = tokens(1, 220)
    plain = policy.compress(prefill(attached("llama"), ids, policies=[policy]), budget=16)
    attacked = policy.compress(prefill(attached("llama"), ids, policies=[policy], protect=protection), budget=16)
    for cache in (plain, attacked):
        assert_kept(cache, [[(180, 184), (218, 220)]])
        assert all(len(cache.kept_positions(layer, 0, 0)) == 16 for layer in cache.compressible)
    taken = [set(attacked.kept_positions(layer, 0, 0).tolist()) & set(range(4, 164)) for layer in (0, 1, 2)]
    assert all(set(range(4, 12)) <= part for part in taken)  # half of 16, the earliest; later ones compete as before
