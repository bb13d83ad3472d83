"""Moments of evicted entries: what they are, what attention makes of them, what they cost, and their gradients."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.models import assert_logits_close, attached, padded, policy_for, tokens
from torch import Tensor

from learnkv import CompressedCache, continuation, generate, load_policy, prefill
from learnkv.allocators import AdaKV
from learnkv.cache.offload import offload
from learnkv.cache.pack import pack
from learnkv.cache.states import Kept, Prompt
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.errors import UserError
from learnkv.ops.evicted_moments import estimated_attention, merged_moments, weighted_moments
from learnkv.pages import Quest
from learnkv.policy.policy import Policy
from learnkv.residuals import Moments
from learnkv.scorers import H2O, SnapKV

STORES = {"moments": Moments(), "means": Moments(order=0)}
every_store = pytest.mark.parametrize("name", STORES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_moments_are_those_of_the_entries_that_count() -> None:
    keys, values = draw(2, 3, 9, 4), draw(2, 3, 9, 4, seed=1)
    gone = draw(2, 3, 9, seed=2) > -0.5
    parts = weighted_moments(keys.masked_fill(~gone.unsqueeze(-1), torch.nan), values, gone)
    for row, head in ((0, 0), (1, 2)):
        own = keys[row, head][gone[row, head]], values[row, head][gone[row, head]]
        assert parts["count"][row, head] == len(own[0])
        torch.testing.assert_close(parts["mean_key"][row, head], own[0].mean(0))
        apart = [part - part.mean(0) for part in own]
        torch.testing.assert_close(parts["covariance"][row, head], apart[1].T @ apart[0] / len(own[0]))


def test_moments_of_two_sets_are_those_of_their_union() -> None:
    keys, values = draw(1, 2, 12, 4), draw(1, 2, 12, 4, seed=1)
    gone = torch.ones(1, 2, 12, dtype=torch.bool)
    first, second = gone.clone(), gone.clone()
    first[..., 5:], second[..., :5] = False, False
    first[0, 1], second[0, 1] = False, True  # a head that had evicted nothing
    whole = weighted_moments(keys, values, gone)
    both = merged_moments(weighted_moments(keys, values, first), weighted_moments(keys, values, second))
    for name, part in whole.items():
        torch.testing.assert_close(both[name], part)


def test_the_estimate_is_exact_to_first_order_and_a_lower_bound() -> None:
    keys, values, query = draw(1, 1, 50, 6), draw(1, 1, 50, 6, seed=1), draw(1, 2, 3, 6, seed=2)
    parts = weighted_moments(keys, values, torch.ones(1, 1, 50))
    errors = []
    for size in (0.1, 0.01):
        logits = size * query @ keys.mT
        output, lse = estimated_attention(size * query, scaling=1.0, **parts)
        errors.append((output - logits.softmax(-1) @ values).abs().max())
        assert (lse <= logits.logsumexp(-1)).all()
    assert errors[1] < errors[0] / 50


def kept_of(keys: Tensor, values: Tensor, kept: Tensor, store: Moments) -> Kept:
    """A prompt of one row whose heads keep entries as `kept` [H, S] says."""
    prompt = Prompt(keys, values)
    pool, length = [], kept.sum(-1)
    for head, of_head in enumerate(kept):
        pool.append(torch.stack([keys[0, head][of_head], values[0, head][of_head]]))
    stacked = torch.cat(pool, 1)
    segment = Segment(stacked[0], stacked[1], torch.arange(len(stacked[0])), length.cumsum(0) - length, length, 99)
    return Kept(segment, evicted=prompt.evicted_with(store, ~kept.unsqueeze(0)))


def test_entries_that_are_alike_are_remembered_exactly() -> None:
    """A head evicts copies of one entry, another nothing: attention is that to everything."""
    keys, values = draw(1, 2, 20, 8).float(), draw(1, 2, 20, 8, seed=1).float()
    keys, values = (part.half().float() for part in (keys, values))  # as they are stored
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[0, 6:] = False
    keys[0, 0, 6:], values[0, 0, 6:] = keys[0, 0, 6].clone(), values[0, 0, 6].clone()
    query, new = draw(1, 4, 2, 8, seed=2).float(), draw(2, 1, 2, 2, 8, seed=3).float()
    tail = DecodeBuffer(new[0], new[1], 2)
    whole = Kept(Segment.whole(keys, values, torch.arange(20).unsqueeze(0)))
    expected = whole.attend(query, tail, None, 0.4)
    for store in (Moments(), Moments(order=0)):
        torch.testing.assert_close(kept_of(keys, values, kept, store).attend(query, tail, None, 0.4), expected)
    forgotten = kept_of(keys, values, kept, Moments())
    forgotten = Kept(forgotten.segment)
    assert (forgotten.attend(query, tail, None, 0.4) - expected).abs().max() > 1e-2


def policy(name: str, **more: Any) -> Policy:
    return Policy(SnapKV(window=8), AdaKV(), residual=STORES[name], **more)


def run(cache: CompressedCache, ids: Tensor) -> Tensor:
    return torch.cat([continuation(attached("llama"), one, cache) for one in ids.split(1, 1)], 1)


def read(name: str, rows: Sequence[Tensor], chunk_size: int | None = None, keep: float = 0.3) -> CompressedCache:
    cache = prefill(attached("llama"), *padded(rows), policies=[policy(name)], chunk_size=chunk_size)
    return policy(name).compress(cache, keep=keep)


@every_store
def test_a_batch_is_every_row_alone_however_it_was_read(name: str) -> None:
    model = attached("llama")
    prompts = [tokens(1, n, seed=4)[0] for n in (50, 37, 26)]
    questions, more = [tokens(1, n, seed=5)[0] for n in (6, 2, 3)], tokens(3, 4, seed=6)
    together = read(name, prompts, chunk_size=11)
    continuation(model, *padded(questions, "right")[:1], together, padded(questions, "right")[1])
    logits = run(together, more)
    for row in range(3):
        alone = read(name, prompts[row : row + 1])
        continuation(model, questions[row].unsqueeze(0), alone)
        assert_logits_close(logits[row], run(alone, more[row : row + 1])[0])


def test_forks_beams_and_several_tokens() -> None:
    model, said, prompts = attached("llama"), tokens(2, 6, seed=7), list(tokens(2, 40))
    alone = run(read("moments", prompts), said)
    first = read("moments", prompts)
    assert_logits_close(continuation(model, said, first.fork()), alone)  # together or one by one
    run(first, said[:, :2])
    run(first.fork(), tokens(2, 9, seed=8))
    assert torch.equal(run(first, said[:, 2:]), alone[:, 2:])
    searched = generate(model, said[:, :3], read("moments", prompts), max_new_tokens=6, num_beams=2)
    rows = [
        generate(model, said[row : row + 1, :3], read("moments", [prompts[row]]), max_new_tokens=6, num_beams=2)
        for row in range(2)
    ]
    assert torch.equal(searched, torch.cat(rows))


def test_attention_changes_and_keeping_everything_does_not() -> None:
    prompts, ids = [tokens(1, 60)[0]], tokens(1, 5, seed=2)
    plain = Policy(SnapKV(window=8), AdaKV())
    whole = prefill(attached("llama"), prompts[0][None], policies=[plain])
    small = plain.compress(whole.fork(), keep=0.3)
    residual = policy("moments").compress(whole.fork(), keep=0.3)
    assert all(
        torch.equal(one.segment.positions, other.segment.positions)
        for one, other in zip(small.compressed_layers(), residual.compressed_layers(), strict=True)
    )
    assert (run(residual, ids) - run(small, ids)).abs().max() > 1e-3
    everything = whole.fork()
    everything.seal()
    assert torch.equal(run(policy("moments").compress(whole.fork(), keep=1.0), ids), run(everything, ids))


@every_store
def test_bytes_are_the_formula_and_the_walk_and_within_the_budget(name: str) -> None:
    heads, layers, dim = 2, 3, 16
    store = STORES[name]
    expected = 4 + 2 * (2 * dim + (dim * dim if store.order else 0))
    assert store.nbytes(dim) == expected
    rows = [tokens(1, n, seed=4)[0] for n in (90, 61)]
    model = attached("llama")
    whole = prefill(model, *padded(rows), policies=[policy(name)])
    plain = Policy(SnapKV(window=8), AdaKV()).compress(whole.fork(), keep=0.3)
    small = policy(name).compress(whole.fork(), keep=0.3)
    assert small.nbytes - plain.nbytes == 2 * heads * layers * expected
    assert sum(small.row_nbytes()) - sum(plain.row_nbytes()) == 2 * heads * layers * expected
    asked = 15_000
    for precision in (None, 8):
        spent = policy(name, precision=precision).compress(whole.fork(), bytes=asked)
        assert all(asked - 2 * dim * 8 < row <= asked for row in spent.row_nbytes())
        held = {
            part.untyped_storage().data_ptr(): part.nbytes
            for layer in spent.compressed_layers()
            for part in (layer.state.evicted.tensors() if layer.state.evicted else [])
        }
        assert sum(held.values()) == 2 * heads * layers * expected


def test_layer_by_layer_is_all_at_once() -> None:
    model, ids = attached("llama"), tokens(2, 40)
    store = Policy(SnapKV(window=8), residual="moments")
    assert isinstance(store.residual, Moments)
    whole = store.compress(prefill(model, ids, policies=[store]), keep=0.3)
    once = prefill(model, ids, policy=store, keep=0.3)
    for one, other in zip(whole.compressed_layers(), once.compressed_layers(), strict=True):
        for name, part in one.state.evicted.parts.items():
            torch.testing.assert_close(other.state.evicted.parts[name], part)


def test_what_is_evicted_while_tokens_are_added_is_remembered_too() -> None:
    model = attached("llama")
    online = Policy(H2O(), residual=Moments(), evict_interval=4, sinks=1, recent=2)
    cache = online.compress(prefill(model, tokens(2, 30), policies=[online]), keep=0.4)
    run(cache, tokens(2, 9, seed=3))
    for layer in cache.compressed_layers():
        kept = layer.segment.length.view(2, -1)
        assert torch.equal(layer.state.evicted.parts["count"], 30 + 8 - kept.float())
    rows = [online.compress(prefill(model, row[None], policies=[online]), keep=0.4) for row in tokens(2, 30)]
    for row, alone in enumerate(rows):
        run(alone, tokens(2, 9, seed=3)[row : row + 1])
        assert_logits_close(
            run(cache.fork(), tokens(2, 1, seed=4))[row], run(alone, tokens(2, 1, seed=4)[row : row + 1])[0]
        )


def dense(mask: Tensor, query: Tensor, prompt: Prompt, tail: DecodeBuffer, scaling: float, store: Moments) -> Tensor:
    """Attention with a mask [B, H, S] on softmax weights and moments of what it leaves out, all differentiable."""
    group = query.shape[1] // prompt.keys.shape[1]
    keys, values = (torch.cat(pair, 2) for pair in ((prompt.keys, tail.keys), (prompt.values, tail.values)))
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    weight = torch.cat([mask, torch.ones_like(tail.keys[..., 0])], -1).repeat_interleave(group, 1).unsqueeze(2)
    logits = query @ keys.mT * scaling
    other, lse = store.attend(query, store.summarise(prompt.keys, prompt.values, 1 - mask), scaling)
    shift = logits.amax(-1, keepdim=True).detach()
    mass = weight * (logits - shift).exp()
    of_others = (lse.unsqueeze(-1) - shift).exp()
    return (mass @ values + of_others * other) / (mass.sum(-1, keepdim=True) + of_others)


@every_store
@pytest.mark.parametrize("copies", [1, 2])
def test_gradients_are_those_of_attention_with_everything_written_out(name: str, copies: int) -> None:
    store = STORES[name]
    prompt = Prompt(draw(1, 2, 15, 4).float(), draw(1, 2, 15, 4, seed=1).float())
    query, new = draw(copies, 4, 1, 4, seed=2).float().requires_grad_(), draw(2, copies, 2, 1, 4, seed=3).float()
    kept = torch.zeros(1, 2, 15, dtype=torch.bool)
    kept[..., ::3] = True
    gates = kept.float().requires_grad_()
    gone = prompt.evicted_with(store, (~kept) + (gates.detach() - gates))
    stored = kept_of(prompt.keys, prompt.values, kept[0], store).segment.rows(torch.zeros(copies, dtype=torch.long), 2)
    relaxed = prompt.relax(stored, gates, evicted=gone)
    relaxed = relaxed.repeat(torch.zeros(copies, dtype=torch.long), 2, copies) if copies > 1 else relaxed
    relaxed = type(relaxed)(**{**vars(relaxed), "segment": stored})
    pull = draw(copies, 4, 1, 4, seed=5).float()
    tail = DecodeBuffer(new[0], new[1], 1)
    output = relaxed.attend(query, tail, None, 0.5)
    ours = torch.autograd.grad((output * pull).sum(), (gates, query))

    mask = kept.float().requires_grad_()
    rows = Prompt(*(part.expand(copies, -1, -1, -1) for part in (prompt.keys, prompt.values)))
    truth = dense(mask.expand(copies, -1, -1), query, rows, tail, 0.5, store)
    theirs = torch.autograd.grad((truth * pull).sum(), (mask, query))
    torch.testing.assert_close(output, truth, rtol=2e-2, atol=2e-3)  # what is stored is rounded to float16
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-3)


def test_a_learned_policy_trains_with_what_is_deployed() -> None:
    model, learned = attached("llama"), policy_for("tokens", attached("llama"))
    learned = copy.deepcopy(learned).requires_grad_()
    student = Policy(learned.scorer, learned.allocator, residual="moments")
    cache, ids = prefill(model, tokens(2, 40), policies=[student]), tokens(2, 3, seed=2)
    relaxed = student.relax(cache, keep=0.3)
    logits = continuation(model, ids, relaxed)
    with torch.no_grad():
        assert_logits_close(continuation(model, ids, student.compress(cache.fork(), keep=0.3)), logits.detach())
    gradients = torch.autograd.grad(logits.square().mean(), list(student.parameters()), allow_unused=True)
    used = [one for one in gradients if one is not None]
    assert used
    assert all(bool(one.isfinite().all()) for one in used)
    assert any(bool(one.any()) for one in used)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"scorer": None, "residual": "moments"}, "residual=Moments: expected a policy that evicts"),
        ({"scorer": SnapKV(), "pages": Quest(), "read": 0.5, "residual": "moments"}, "residual=Moments"),
        ({"scorer": SnapKV(), "rerotate": "start", "residual": "moments"}, "residual=Moments rerotate=start"),
        ({"scorer": SnapKV(), "residual": "means"}, "residual='means': expected moments"),
    ],
)
def test_what_does_not_go_together_is_refused(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Policy(**parts)


def test_soft_gates_and_numbers_beyond_float16_are_refused() -> None:
    with pytest.raises(UserError, match="residual=Moments: not trained with soft gates"):
        policy("moments").relax(prefill(attached("llama"), tokens(1, 20), window=8), keep=0.5, soft=True)
    with pytest.raises(UserError, match="mean_value of evicted entries has numbers that float16 does not hold"):
        Moments().rounded({"count": torch.ones(1, 1), "mean_value": torch.full((1, 1, 2), 1e6)})


@pytest.mark.parametrize(("name", "order"), [("momentkv", 1), ("momentkv_means", 0)])
def test_the_shipped_files_have_a_store(name: str, order: int) -> None:
    shipped = load_policy(name)
    assert shipped.residual.order == order
    assert shipped.base_policy().spec()["residual"] == shipped.spec()["residual"]


def test_what_is_remembered_is_neither_stored_nor_offloaded() -> None:
    cache = read("moments", [tokens(1, 40)[0]])
    with pytest.raises(UserError, match="residual=Moments: not stored"):
        pack(cache)
    with pytest.raises(UserError, match="offload: expected a cache with all entries"):
        offload(cache)
