"""Entries in fewer bits: attention reads what the codecs decode, and bytes are counted exactly."""

from collections.abc import Iterator

import pytest
import torch
from support.models import Oracle, assert_logits_close, attached, build, padded, tokens
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from learnkv import CompressedCache, Policy, continuation, prefill
from learnkv.allocators import AdaKV, LearnedAllocator
from learnkv.cache.stored_prompt import stored_prompt
from learnkv.codecs import FP8, KIVIKeys, KIVIValues, ThinK, TurboQuant
from learnkv.errors import UserError
from learnkv.ops.arguments import Codes
from learnkv.precision import LearnedPrecision, Precision, UniformPrecision
from learnkv.scorers import SnapKV

LAYERS, HEADS, LENGTHS = 3, 2, (57, 40)
BUDGET = 0.3
INDEPENDENT = ["4", "K8V2", "16", "learned", "codecs"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def learned() -> LearnedPrecision:
    """Distortions and scales that differ from head to head."""
    precision = LearnedPrecision(("K3V2", "K4V2", "K4V3", "K8V4", "16"), "K4V3", LAYERS, HEADS)
    generator = torch.Generator().manual_seed(3)
    distortion = torch.tensor([0.6, 0.4, 0.2, 0.05, 0.01]) * torch.rand(LAYERS, HEADS, 5, generator=generator)
    precision.set_distortions(distortion)
    precision.scale_growth.copy_(0.1 * torch.randn(LAYERS, HEADS, generator=generator))
    return precision


PRECISIONS: dict[str, Precision | int] = {
    "4": 4,
    "16": 16,
    "K8V2": UniformPrecision(8, 2),
    "codecs": UniformPrecision(TurboQuant(3), FP8()),
    "kivi": UniformPrecision(KIVIKeys(2, 4, 4), KIVIValues(2, 8, 4)),
    "think": UniformPrecision(ThinK(0.5, recent=3), 8),
}


def policy(name: str) -> Policy:
    precision = learned() if name == "learned" else PRECISIONS[name]
    allocator = LearnedAllocator(AdaKV(), LAYERS, HEADS, by="scores")
    return Policy(SnapKV(window=8), allocator, sinks=2, recent=3, precision=precision)


def read(name: str, rows: tuple[int, ...] = LENGTHS) -> tuple[Policy, CompressedCache]:
    prompt = padded([tokens(1, length)[0] for length in rows])
    made = policy(name)
    return made, prefill(attached("llama"), *prompt, policies=[made])


class StoredOracle(Oracle):
    """Attention of an untouched model to entries that were replaced by what codecs make of them."""

    def after(self, prompt: Tensor, kept: Tensor, entries: list[tuple[Tensor, Tensor]], new: Tensor) -> Tensor:
        """Logits [T, V] of tokens [T] after a prompt [S] whose heads see `kept` [L, H, S] of `entries` [H, S, D]."""
        cache = DynamicCache(config=self.model.config)
        self.model.set_attn_implementation("sdpa")
        self.model(input_ids=prompt.unsqueeze(0), past_key_values=cache, logits_to_keep=1)
        for layer, (keys, values) in zip(cache.layers, entries, strict=True):
            layer.keys, layer.values = keys.unsqueeze(0), values.unsqueeze(0)
        self.kept = kept
        self.model.set_attn_implementation(self.NAME)
        AttentionInterface.register(self.NAME, self._attention)
        return self.model(input_ids=new.unsqueeze(0), past_key_values=cache).logits[0]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_attention_reads_the_decoded_entries(name: str) -> None:
    made, cache = read(name)
    plan = made.plan(cache, bytes=BUDGET)
    assert plan.levels is not None
    chosen = plan.chosen
    stored = [
        stored_prompt(layer.prompt, plan.levels.levels, idx) for idx, layer in enumerate(cache.compressed_layers())
    ]
    question = tokens(2, 5, seed=7)
    got = continuation(attached("llama"), question, made.compress(cache.fork(), bytes=BUDGET))
    for row, length in enumerate(LENGTHS):
        prompt = tokens(1, length)[0]
        entries = []
        for layer_idx, at_levels in enumerate(stored):
            pick = (chosen[layer_idx, row, :, -length:].long() - 1).clamp_min(0)[None, ..., None]
            parts = [torch.stack([part[row, :, -length:] for part in side]) for side in zip(*at_levels, strict=True)]
            keys, values = (part.gather(0, pick.expand(1, *part.shape[1:]))[0] for part in parts)
            entries.append((keys, values))
        want = StoredOracle(build("llama")).after(prompt, chosen[:, row, :, -length:] > 0, entries, question[row])
        assert_logits_close(got[row], want)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_row_of_a_batch_is_the_row_alone(name: str) -> None:
    made, cache = read(name)
    both = made.compress(cache, bytes=BUDGET)
    for row, length in enumerate(LENGTHS):
        alone = made.compress(read(name, (length,))[1], bytes=BUDGET)
        assert alone.row_nbytes() == [both.row_nbytes()[row]]
        for layer in range(LAYERS):
            for head in range(HEADS):
                assert torch.equal(alone.kept_positions(layer, 0, head), both.kept_positions(layer, row, head))


@pytest.mark.parametrize("name", [*INDEPENDENT, "kivi", "think"])
@pytest.mark.parametrize("asked", [0.15, 0.4, "5KB"])
def test_bytes_are_the_formula_and_never_exceed_what_was_asked(name: str, asked: float | str) -> None:
    made, cache = read(name)
    full = [2 * 2 * 16 * HEADS * LAYERS * n for n in LENGTHS]
    compressed = made.compress(cache, bytes=asked)
    assert compressed.row_full_nbytes() == full
    assert compressed.nbytes == sum(compressed.row_nbytes())
    most = [5 * 1024] * 2 if isinstance(asked, str) else [int(asked * of_row) for of_row in full]
    whole = [share == 1 for share in compressed.spent]
    for held, limit, everything in zip(compressed.row_nbytes(), most, whole, strict=True):
        assert held <= limit
        if name in INDEPENDENT and not everything:
            assert limit - held < 68  # an entry of 16 bits


def test_forks_rows_and_beams_share_what_is_stored() -> None:
    made, cache = read("learned")
    compressed = made.compress(cache, bytes=BUDGET)
    question = tokens(2, 4, seed=5)
    want = continuation(attached("llama"), question, compressed.fork())
    again = continuation(attached("llama"), question, compressed.fork())
    assert torch.equal(want, again)
    swapped = compressed.fork()
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    got = continuation(attached("llama"), question[[1, 0, 1]], swapped)
    torch.testing.assert_close(got, want[[1, 0, 1]])
    repeated = compressed.fork()
    repeated.batch_repeat_interleave(2)
    got = continuation(attached("llama"), question.repeat_interleave(2, 0), repeated)
    torch.testing.assert_close(got, want.repeat_interleave(2, 0))
    codes = {
        tensor.untyped_storage().data_ptr() for tensor in compressed.compressed_layers()[0].state.tiers[0].tensors()
    }
    shared = {
        tensor.untyped_storage().data_ptr() for tensor in repeated.compressed_layers()[0].state.tiers[0].tensors()
    }
    assert len(codes & shared) >= 6  # codes, scales, zeros of both, positions: all but the tables


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_student_sees_what_is_deployed(name: str) -> None:
    made, cache = read(name)
    question = tokens(2, 5, seed=3)
    want = continuation(attached("llama"), question, made.compress(cache.fork(), bytes=BUDGET))
    got = continuation(attached("llama"), question, made.relax(cache, bytes=BUDGET))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_chunked_prompt_is_the_whole_one() -> None:
    made, cache = read("learned", (57,))
    whole = made.compress(cache, bytes=BUDGET)
    parts = made.compress(prefill(attached("llama"), tokens(1, 57), chunk_size=13, policies=[made]), bytes=BUDGET)
    question = tokens(1, 3, seed=2)
    got, want = (continuation(attached("llama"), question, one) for one in (parts, whole))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_one_shot_reading_keeps_the_same() -> None:
    made = Policy(SnapKV(window=8), sinks=2, recent=3, precision={"keys": 4, "values": 3})
    assert made.reads_once
    ids = tokens(1, 57)
    want = made.compress(prefill(attached("llama"), ids, policies=[made]), keep=0.3)
    got = prefill(attached("llama"), ids, policy=made, keep=0.3)
    assert got.nbytes == want.nbytes
    question = tokens(1, 3, seed=2)
    assert torch.equal(*(continuation(attached("llama"), question, one) for one in (got, want)))


def test_a_cache_that_evicts_nothing_is_stored_in_fewer_bits() -> None:
    plain = Policy(None, precision=4)
    cache = plain.compress(prefill(attached("llama"), tokens(1, 57)), keep=1)
    assert cache.spent == [1.0]
    assert cache.nbytes == 57 * LAYERS * HEADS * (2 * (8 + 4) + 4) + 8 * HEADS * (LAYERS + 1)
    with pytest.raises(UserError, match="keeps every entry"):
        plain.compress(prefill(attached("llama"), tokens(1, 57)), bytes=0.1)


def online(precision: Precision | int | None, **changes: int) -> Policy:
    return Policy(SnapKV(window=8), AdaKV(), sinks=2, recent=3, precision=precision, **{"evict_interval": 6, **changes})


@pytest.mark.parametrize("spend", [{"keep": 0.4}, {"bytes": 0.2}])
@pytest.mark.parametrize("precision", [4, {"keys": 8, "values": 2}])
def test_the_tail_is_stored_in_fewer_bits_when_it_is_merged(precision: int, spend: dict[str, float]) -> None:
    """Bytes stay within the prompt's, and every token is rounded once: its codes never change."""
    model, made = attached("llama"), online(precision)
    cache = made.compress(prefill(model, *padded([tokens(1, n)[0] for n in LENGTHS]), policies=[made]), **spend)
    first = cache.nbytes
    seen: dict[tuple[int, int, int], Tensor] = {}
    merged = 0
    for step in range(40):
        model(input_ids=tokens(2, 1, seed=step), past_key_values=cache)
        assert sum(cache.row_nbytes()) <= first
        for key, codes in stored_codes(cache).items():
            merged += key[-1] >= max(LENGTHS)
            torch.testing.assert_close(codes, seen.setdefault(key, codes), rtol=0, atol=0)
    assert merged > 0


def stored_codes(cache: CompressedCache) -> dict[tuple[int, ...], Tensor]:
    """Codes of keys and values by layer, row and position."""
    codes: dict[tuple[int, ...], Tensor] = {}
    for layer_idx, layer in enumerate(cache.compressed_layers()):
        (tier,) = layer.state.tiers
        for row in range(len(tier.entries.offset)):
            begin = int(tier.entries.offset[row])
            for place, position in enumerate(tier.row_positions(row).tolist(), begin):
                parts = [part.tensors["codes"][place] for part in (tier.keys, tier.values)]
                codes[layer_idx, row, position] = torch.cat(parts)
    return codes


def test_online_eviction_keeps_the_entries_that_16_bits_keep_where_codes_are_fine() -> None:
    """At 8 bits a scorer ranks nearly as it does at full precision: most kept positions agree after four evictions."""
    model, ids = attached("llama"), tokens(1, 57)
    kept = []
    for precision in (None, 8):
        made = online(precision)
        cache = made.compress(prefill(model, ids, policies=[made]), keep=0.4)
        for step in range(24):
            model(input_ids=tokens(1, 1, seed=step), past_key_values=cache)
        kept.append({(la, h, int(p)) for la in range(3) for h in range(2) for p in cache.kept_positions(la, 0, h)})
    assert len(kept[0]) == len(kept[1])
    assert len(kept[0] & kept[1]) > 0.9 * len(kept[0])


def test_online_eviction_needs_one_level_of_independent_entries() -> None:
    with pytest.raises(UserError, match="expected one level, whose entries do not depend"):
        online(learned())
    with pytest.raises(UserError, match="expected one level, whose entries do not depend"):
        online(PRECISIONS["kivi"])
    made = online(4)
    cache = prefill(attached("llama"), tokens(1, 57), policies=[made])
    with pytest.raises(UserError, match="evict_interval=6 precision=4: not trained together"):
        made.relax(cache, keep=0.4)


def test_all_tiers_of_codes_have_the_same_bases() -> None:
    """One tensor each for keys and values, which the kernel turns queries and outputs by, in beams and forks, too."""
    made, cache = read("learned")
    compressed = made.compress(cache, bytes=BUDGET)
    compressed.batch_repeat_interleave(2)
    tiers = [tier.arguments(torch.float32) for layer in compressed.compressed_layers() for tier in layer.state.tiers]
    coded = [tier for tier in tiers if isinstance(tier.keys, Codes)]
    assert len(coded) > LAYERS
    assert len({tier.key_basis.data_ptr() for tier in coded}) == 1
    assert len({tier.value_basis.data_ptr() for tier in coded}) == 1


def test_a_policy_that_evicts_nothing_refuses_bytes_that_hold_the_short_row_only() -> None:
    plain = Policy(None, precision=4)
    cache = prefill(attached("llama"), *padded([tokens(1, length)[0] for length in (57, 20)]))
    with pytest.raises(UserError, match="keeps every entry"):
        plain.compress(cache, bytes="4KB")  # 20 tokens take 3.7 KB, 57 take 9.9
