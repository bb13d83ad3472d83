"""Bytes, operations and limits against numbers worked out by hand."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import limits
from benchmarks.limits import Ceilings, Work
from benchmarks.shapes import LLAMA_8B, QWEN_05B, QWEN_06B, QWEN_7B, SHAPES, Shape
from benchmarks.sweeps.decode import row_lengths

H200 = Ceilings(read=4.3e12, copy=4.3e12, flops=790e12, node_us=1.2)


@pytest.mark.parametrize(
    ("shape", "weights", "streamed", "token_bytes"),
    [
        (LLAMA_8B, 16.06e9, 15.01e9, 131072),
        (QWEN_7B, 15.23e9, 14.14e9, 57344),
        (QWEN_06B, 1.19e9, 1.19e9, 114688),
        (QWEN_05B, 0.99e9, 0.99e9, 12288),
    ],
)
def test_published_sizes(shape: Shape, weights: float, streamed: float, token_bytes: int) -> None:
    assert 2 * shape.parameters == pytest.approx(weights, abs=5e6)
    assert shape.streamed == pytest.approx(streamed, abs=5e6)
    assert shape.token_bytes == token_bytes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parameters_are_those_that_are_built(shape: Shape) -> None:
    tiny = shape.tiny()
    model = tiny.build(torch.device("cpu"))
    assert sum(held.numel() for held in model.parameters()) == tiny.parameters
    assert model.dtype == torch.bfloat16
    assert not any(held.requires_grad for held in model.parameters())
    assert model.config.num_attention_heads // model.config.num_key_value_heads == shape.group


def test_an_8b_model_has_its_parameters() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(held.numel() for held in model.parameters()) == LLAMA_8B.parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("batch", "prompt", "kept", "full_ms", "ratio"),
    [(1, 131072, 2048, 7.49, 2.11), (8, 32768, 512, 11.48, 3.18), (8, 131072, 13107, 35.45, 5.30)],
)
def test_whole_steps(batch: int, prompt: int, kept: int, full_ms: float, ratio: float) -> None:
    """The ideal full cache and what a perfect compressed one gains, as the limits of the project were worked out."""
    full = H200.limit_us(Work(LLAMA_8B.step_bytes(batch, prompt)))
    small = H200.limit_us(Work(LLAMA_8B.step_bytes(batch, kept)))
    assert full == pytest.approx(1e3 * full_ms, rel=2e-3)
    assert full / small == pytest.approx(ratio, rel=5e-3)


def test_the_page_says_what_bytes_allow() -> None:
    """The table of docs/performance.md, worked out again."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    for shape in SHAPES.values():
        (line,) = [
            line for line in page.splitlines() if line.startswith(f"| {shape.name} | {shape.streamed / 1e9:.2f} ")
        ]
        token, *gains = [cell.strip().replace(",", "") for cell in line.split("|")[3:-1]]
        assert int(token) == shape.token_bytes
        for (batch, prompt, kept), gain in zip(
            [(1, 32768, 512), (8, 32768, 512), (1, 131072, 2048)], gains, strict=True
        ):
            possible = shape.step_bytes(batch, prompt) / shape.step_bytes(batch, kept)
            assert float(gain) == pytest.approx(possible, rel=6e-3)


def test_a_decode_call() -> None:
    """B=8, 512 kept: 8 rows x 8 heads x 512 entries x 256 numbers of 2 bytes, 3.9 us; queries add a hundredth."""
    work = limits.decode_attention(8 * 8 * 512, 64, 4, 128)
    assert work.bytes == 16_777_216 + 2 * 8 * 32 * 128 * 2 + 8 * 32 * 4
    assert work.flops == 2 * 2 * 8 * 32 * 512 * 128
    assert H200.floor_us(work) == pytest.approx(3.93, abs=0.02)
    assert H200.limit_us(work) == pytest.approx(3.93 + 2.4, abs=0.02)


def test_entries_in_fewer_bits() -> None:
    """1,000 entries of 128 channels over 8 rows, in 4 and 3 bits: 68 and 52 bytes; 16 slots of the tail and queries."""
    work = limits.decode_tiers(1000, 8, 16, 4, 128, 4, 3)
    around = 8 * 16 * 512 + 2 * 8 * 4 * 128 * 2 + 8 * 4 * 4
    assert work.bytes == 1000 * (64 + 4 + 48 + 4) + around
    whole = limits.decode_tiers(1000, 8, 16, 4, 128, 16, 16)
    assert whole == limits.decode_attention(1000 + 8 * 16, 8, 4, 128)
    assert limits.quantize_entries(1000, 128, 3).bytes == 1000 * (256 + 8 + 52)


def test_the_page_says_what_an_entry_takes() -> None:
    """The table of docs/performance.md, worked out again."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if re.match(r"\| \d+ / \d+ \|", line)]
    assert len(lines) == 7
    for line in lines:
        levels, *sizes, share = [cell.strip() for cell in line.split("|")[1:-1]]
        keys, values = map(int, levels.split(" / "))
        found = [limits.decode_tiers(1, 0, 0, 1, dim, keys, values).bytes for dim in (64, 128)]
        assert found == [int(size) for size in sizes]
        assert float(share) == pytest.approx(found[1] / 512, abs=6e-4)


def test_what_eviction_adds() -> None:
    """Llama at 128k: keys of a layer are 268 MB; one reading with 128 queries 62 us, two 125, radix 3.9, compaction."""
    one, two = (limits.window_scores(1, 8, 4, 32, 131072, 128, passes) for passes in (1, 2))
    assert one.bytes == 131072 * 8 * 128 * 2 + 8 * 131072 * 4
    assert two.bytes - one.bytes == 131072 * 8 * 128 * 2
    assert H200.floor_us(one) == pytest.approx(63, abs=1)
    assert H200.floor_us(two) == pytest.approx(126, abs=1)
    assert one.flops == 2 * 32 * 32 * 131072 * 128
    assert H200.floor_us(limits.select(8, 131072)) == pytest.approx(3.9, abs=0.05)
    moved = limits.gather_kv(8 * 13107, 128)
    assert moved.bytes == 8 * 13107 * (4 * 256 + 8)
    assert H200.floor_us(moved) == pytest.approx(25, abs=0.3)
    assert H200.floor_us(limits.page_bounds(8, 131072, 128, 16)) == pytest.approx(70, abs=0.5)


def test_prefill_of_an_8b_model() -> None:
    seconds = limits.prefill(LLAMA_8B.linear, 4096, 32, 32768) / 790e12
    assert seconds == pytest.approx(0.935, abs=0.002)


def test_gated_attention() -> None:
    """512 queries after 32k: u = 32 heads x 128 x pairs, 4u forward and 4u back to the gates, 0.35 ms each."""
    work = limits.gated_attention(512, 32768, 32, 128, products=2)
    assert work.flops == 4 * 32 * 128 * 512 * (32768 - 256)
    assert H200.floor_us(work) == pytest.approx(350, rel=0.02)


def test_the_slower_of_bytes_and_operations_counts() -> None:
    assert H200.floor_us(Work(4.3e6, 790e6)) == pytest.approx(1)
    assert H200.floor_us(Work(4.3e6, 3 * 790e6)) == pytest.approx(3)
    assert Ceilings(4e12, 2e12, 1e15, 1).floor_us(Work(4e6, traffic="copy")) == pytest.approx(2)


@pytest.mark.parametrize("skew", ["uniform", "adakv", "dominant"])
@pytest.mark.parametrize(("batch", "heads", "kept"), [(8, 8, 512), (1, 4, 13107), (32, 8, 128)])
def test_unequal_heads_spend_the_same(skew: str, batch: int, heads: int, kept: int) -> None:
    lengths = row_lengths(batch, heads, kept, skew)
    assert len(lengths) == batch * heads
    assert sum(lengths) == batch * heads * kept
    assert min(lengths) >= 1
    if skew == "adakv":
        rows = [sum(lengths[at : at + heads]) for at in range(0, len(lengths), heads)]
        assert set(rows) == {heads * kept}
        assert min(lengths) >= 0.2 * kept - 1
        assert 2 < max(lengths) / kept < 5.2
