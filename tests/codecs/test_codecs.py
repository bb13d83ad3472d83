"""What holds for every codec: bytes by the formula, rows that do not depend on each other, inputs left alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learnkv import codecs
from learnkv.codecs import Codec
from learnkv.codecs.per_token import Rotation
from learnkv.core.codec import Encoded, Rows
from learnkv.errors import UserError
from learnkv.formats import tensors

DIM, HEADS, GROUP, WINDOW = 16, 2, 2, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Tables(NamedTuple):
    """Files of rotations and codebooks of two layers."""

    rotations: str
    codebooks: str


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    folder = tmp_path_factory.mktemp("tables")
    orthogonal = torch.linalg.qr(normal(2, 2, HEADS, DIM, DIM)).Q
    words = torch.nn.functional.normalize(normal(2, HEADS, 4, 8, 4), dim=-1)
    rotations = tensors.write(folder / "rotations.safetensors", {"keys": orthogonal[0], "values": orthogonal[1]})
    codebooks = tensors.write(folder / "codebooks.safetensors", {"low": words})
    return Tables(str(rotations), str(codebooks))


CODECS: dict[str, Callable[[Tables], Codec]] = {
    "8 bits": lambda _: codecs.PerToken(8),
    "4 bits": lambda _: codecs.PerToken(4),
    "3 bits": lambda _: codecs.PerToken(3, "none", 8),
    "2 bits": lambda _: codecs.PerToken(2, grid="symmetric", scale_dtype="bfloat16"),
    "KIVI keys": lambda _: codecs.KIVIKeys(2, 4, 8),
    "KIVI values": lambda _: codecs.KIVIValues(3, 8, 3),
    "KIVI values without residual": lambda _: codecs.KIVIValues(2, 8, 0),
    "OScaR keys": lambda _: codecs.OScaRKeys(2, 4, 8),
    "OScaR keys, entries rotated": lambda _: codecs.OScaRKeys(4, 4, 8, "max", rotate_entries=True),
    "OScaR values": lambda _: codecs.OScaRValues(2, 8, 8),
    "TurboQuant": lambda _: codecs.TurboQuant(3, "hadamard"),
    "TurboQuant, QR": lambda _: codecs.TurboQuant(2, scale_dtype="float16"),
    "OSCAR": lambda tables: codecs.CovarianceRotation(tables.rotations),
    "OSCAR values": lambda tables: codecs.CovarianceRotation(tables.rotations, "values", group=8),
    "LogQuant": lambda _: codecs.LogQuant(4, 2, group=8),
    "LogQuant, partial": lambda _: codecs.LogQuant(4, 2, log=False, group=8),
    "Spherical": lambda tables: codecs.Spherical(tables.codebooks, "low", 3),
    "Spherical, float radii": lambda tables: codecs.Spherical(tables.codebooks, "low", 0),
    "FP8": lambda _: codecs.FP8(),
    "ThinK": lambda _: codecs.ThinK(0.3, 4, 3),
}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest, tables: Tables) -> Codec:
    return CODECS[request.param](tables)


def queries(rows: int, seed: int = 0) -> Tensor:
    return normal(rows, GROUP, WINDOW, DIM, seed=seed)


def pool(entries: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Normal numbers, an outlier channel, an entry of zeros and a constant one."""
    drawn = normal(entries, DIM, seed=seed)
    drawn[:, 1] *= 30
    drawn[1:2], drawn[2:3] = 0, 0.7
    return drawn.to(dtype)


def encode(codec: Codec, entries: Tensor, lengths: list[int], layer_idx: int = 1) -> Encoded:
    return codec.encode(entries, Rows.of(lengths, layer_idx, queries(len(lengths))))


@pytest.mark.parametrize("name", CODECS)
@given(lengths=st.lists(st.integers(0, 21), max_size=3), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_the_formula_is_the_bytes_that_are_alive(
    name: str, tables: Tables, lengths: list[int], dtype: torch.dtype
) -> None:
    codec, lengths = CODECS[name](tables), [part for part in lengths for _ in range(HEADS)]
    entries = pool(sum(lengths), dtype)
    made = encode(codec, entries, lengths)
    assert made.nbytes == codec.nbytes(lengths, DIM, dtype.itemsize)
    assert made.nbytes == sum(tensor.nbytes for tensor in made.tensors.values())
    decoded = codec.decode(made)
    assert decoded.dtype == torch.float32
    assert decoded.shape == entries.shape
    assert decoded.isfinite().all()


def test_rows_do_not_depend_on_each_other(codec: Codec) -> None:
    lengths, entries = [9, 0, 1, 20], pool(30)
    together = codec.decode(encode(codec, entries, lengths)).split(lengths)
    for row, (part, wanted) in enumerate(zip(entries.split(lengths), together, strict=True)):
        head = row % HEADS
        lone = [len(part) if index == head else 0 for index in range(HEADS)]
        asked = queries(len(lengths))[row : row + 1].repeat(HEADS, 1, 1, 1)
        alone = codec.encode(part, Rows.of(lone, 1, asked))
        torch.testing.assert_close(codec.decode(alone), wanted, rtol=1e-5, atol=1e-5)


def test_rows_lie_anywhere_in_the_pool(codec: Codec) -> None:
    entries, lengths = pool(40), torch.tensor([8, 11])
    rows = Rows(torch.tensor([25, 3]), lengths, 1, queries(2))
    direct = encode(codec, torch.cat([entries[25:33], entries[3:14]]), lengths.tolist())
    gathered = codec.encode(entries, rows)
    assert gathered.entries == direct.entries
    assert all(torch.equal(tensor, direct.tensors[name]) for name, tensor in gathered.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_stay_as_they_are_and_are_not_shared(codec: Codec, dtype: torch.dtype) -> None:
    entries = pool(20, dtype)
    before = entries.clone()
    made = encode(codec, entries, [12, 8])
    decoded = codec.decode(made)
    assert torch.equal(entries, before)
    entries.zero_()
    assert torch.equal(codec.decode(made), decoded)
    assert codec.decode(made, torch.bfloat16).dtype == torch.bfloat16


def test_products_with_queries_survive_the_rotation(codec: Codec) -> None:
    """Two rows of four tokens: what is rotated has the products of what is not, and comes back."""
    asked, keys = normal(2, HEADS, 4, DIM)
    rotated = codec.rotate(asked, 1) @ codec.rotate(keys, 1).mT
    torch.testing.assert_close(rotated, asked @ keys.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codec.unrotate(codec.rotate(keys, 1), 1), keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codec.rotate(keys.bfloat16(), 1), codec.rotate(keys, 1).bfloat16(), rtol=0.02, atol=0.02)


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from(["none", "hadamard"]), st.floats(-6, 2), st.integers(0, 1000))
def test_the_error_of_a_token_is_half_a_step_in_the_stored_basis(
    bits: int, rotation: Rotation, magnitude: float, seed: int
) -> None:
    codec, entries = codecs.PerToken(bits, rotation), pool(6, seed=seed) * 10**magnitude
    made = encode(codec, entries, [6])
    stored = codec.rotate(entries.float().unsqueeze(0))[0]
    low, high = stored.amin(-1), stored.amax(-1)
    smallest, levels = 2.0**-24, 2**bits - 1
    lost = levels * ((high - low) / levels * 2**-11 + smallest) + low.abs() * 2**-11 + smallest
    bound = made.tensors["scale"][:, 0].float() / 2 + lost + 2**-20 * stored.abs().amax(-1)
    assert ((codec.decode(made) - stored).abs() <= bound.unsqueeze(-1)).all()


def test_queries_that_are_no_numbers_are_refused() -> None:
    asked = queries(1)
    asked[0, 1, 4, 2] = math.nan
    with pytest.raises(UserError, match=r"^ThinK: queries hold NaN or infinite numbers$"):
        codecs.ThinK().encode(pool(4), Rows.of([4], queries=asked))


def test_a_rotation_made_without_gradients_serves_where_they_are_computed() -> None:
    codec, vectors = codecs.TurboQuant(2, seed=77), normal(1, 3, DIM).requires_grad_()
    with torch.inference_mode():
        codec.rotate(normal(1, 3, DIM))
    codec.rotate(vectors).sum().backward()
    assert vectors.grad is not None


LARGEST_ERROR = {"8 bits": 1e-4, "4 bits": 0.02, "FP8": 1e-3, "Spherical": 0.7, "Spherical, float radii": 0.7}
"""Mean squared, of a normal variable; others have two or three bits. The words of these codebooks are random."""


@pytest.mark.parametrize("name", CODECS)
def test_what_is_decoded_is_rotated_and_comes_near(name: str, tables: Tables) -> None:
    codec, entries = CODECS[name](tables), normal(64, DIM)
    decoded = codec.decode(encode(codec, entries, [32, 32])).view(2, 32, DIM)
    error = float((codec.unrotate(decoded, 1).flatten(0, 1) - entries).square().mean())
    assert 0 < error < LARGEST_ERROR.get(name, 0.4)
    if codec.basis(1, DIM) is not None:
        assert float((decoded.flatten(0, 1) - entries).square().mean()) > 2 * error


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_without_a_code_are_refused(codec: Codec, bad: float) -> None:
    entries = pool(20)
    entries[7, 5] = bad
    with pytest.raises(UserError, match=rf"^{codec.name}: keys or values hold NaN or infinite numbers, which no code "):
        encode(codec, entries, [12, 8])


@pytest.mark.parametrize(
    "codec", ["4 bits", "OScaR keys", "TurboQuant, QR", "OSCAR", "Spherical", "FP8"], indirect=True
)
def test_numbers_beyond_the_scales_are_refused(codec: Codec) -> None:
    with pytest.raises(UserError, match=rf"^{codec.name}: numbers up to 1e\+30 exceed what float16 scales hold$"):
        encode(codec, torch.full((16, DIM), 1e30), [8, 8])


@pytest.mark.parametrize("codec", ["4 bits", "OScaR values", "TurboQuant", "FP8", "KIVI keys"], indirect=True)
def test_numbers_below_the_smallest_scale_come_near(codec: Codec) -> None:
    entries = 1e-7 * normal(16, DIM)
    back = codec.unrotate(codec.decode(encode(codec, entries, [8, 8])).view(2, 8, DIM), 1)
    assert (back.flatten(0, 1) - entries).abs().max() <= 4e-7


def test_an_encoding_of_a_graph_has_no_gradient(codec: Codec) -> None:
    entries = pool(16, torch.float32).requires_grad_()
    assert not any(tensor.requires_grad for tensor in encode(codec, entries, [8, 8]).tensors.values())


def test_a_codec_can_be_written_as_its_arguments(codec: Codec) -> None:
    again = type(codec)(**codec.spec())
    entries = pool(20)
    first, second = (encode(made, entries, [12, 8]).tensors for made in (codec, again))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_bytes_of_128_channels() -> None:
    """Keys and values of an entry: what the methods report for themselves, at their own types of scale."""
    assert codecs.PerToken(4).nbytes([1], 128) == 64 + 4
    assert codecs.PerToken(3).nbytes([1], 128) == 48 + 4
    assert codecs.PerToken(3).nbytes([1], 80 + 48) == codecs.PerToken(3, "none").nbytes([1], 128)
    kivi = codecs.KIVIKeys(2, 32, 32).nbytes([32], 128) / 32 + codecs.KIVIValues(2, 32, 0).nbytes([32], 128) / 32
    assert kivi == 96
    assert [codecs.TurboQuant(bits).nbytes([1], 128) * 2 for bits in (2, 3, 4)] == [72, 104, 136]
    assert (
        codecs.OScaRKeys(2, 32, 32, heads=8).nbytes([32] * 8, 128)
        == 8 * codecs.KIVIKeys(2, 32, 32).nbytes([32], 128) + 32 * 2
    )
    assert codecs.FP8().nbytes([10], 80) == 820


REFUSED: dict[str, tuple[Callable[[Tables], object], str]] = {
    "no Hadamard": (lambda _: codecs.PerToken(4).nbytes([1], 80), r"^rotation=hadamard: 80 channels "),
    "no Hadamard, keys": (lambda _: codecs.OScaRKeys().nbytes([1], 96), r"^rotation=hadamard: 96 channels "),
    "no Hadamard, signs": (lambda _: codecs.TurboQuant(4, "hadamard").nbytes([1], 80), r"^rotation=hadamard: 80 "),
    "bits": (lambda _: codecs.PerToken(5), r"^bits=5: expected one of 2, 3, 4, 8$"),
    "bits of KIVI": (lambda _: codecs.KIVIKeys(16), r"^bits=16: "),
    "bits of levels": (lambda _: codecs.TurboQuant(8), r"^bits=8: expected 1, 2, 3 or 4$"),
    "rotation": (lambda _: codecs.PerToken(4, "fourier"), r"^rotation='fourier': expected none, hadamard$"),  # type: ignore[arg-type]
    "scales": (lambda _: codecs.FP8("int8"), r"^scale_dtype='int8': expected float16, "),  # type: ignore[arg-type]
    "channels": (lambda _: codecs.PerToken(4, group=5).nbytes([1], 16), r"^group=5: expected a divisor of the 16 "),
    "blocks": (lambda _: codecs.KIVIKeys(2, 32, 48), r"^residual=48 group=32: expected a block of whole groups$"),
    "groups": (
        lambda _: codecs.PerChannel(2, 4).nbytes([6], 16),
        r"^PerChannel: rows of \[6\] entries, expected whole",
    ),
    "heads": (
        lambda _: codecs.TokenNorm(codecs.PerToken(), heads=2).nbytes([3, 4], 16),
        r"^heads=2: rows of \[3, 4\] entries, expected equal numbers",
    ),
    "layers": (
        lambda tables: encode(codecs.CovarianceRotation(tables.rotations), pool(2), [1, 1], 2),
        r"^table=: rotations of 2 layers and 16 channels, got layer 2 with 16$",
    ),
    "rows": (
        lambda tables: encode(codecs.CovarianceRotation(tables.rotations), pool(3), [1, 1, 1]),
        r"^CovarianceRotation: rotations of 2 heads do not suit 3 rows$",
    ),
    "codebooks": (
        lambda tables: codecs.Spherical(tables.codebooks, "low").nbytes([1], 32),
        r"^table=: codebooks of 16 channels, heads have 32$",
    ),
    "tier": (
        lambda tables: codecs.Spherical(tables.codebooks, "high"),
        r"codebooks.safetensors: expected high of shape",
    ),
    "queries": (
        lambda _: codecs.ThinK().encode(pool(2), Rows.of([2])),
        r"^ThinK: needs the last queries of the prompt, got none$",
    ),
    "queries of other rows": (
        lambda _: codecs.ThinK().encode(pool(2), Rows.of([2], queries=queries(2))),
        r"^ThinK: queries \[2, 2, 5, 16\] for 1 rows of 16 channels$",
    ),
    "ratio": (lambda _: codecs.ThinK(1.0), r"^ratio=1.0 recent=32 window=32: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_codec_does_not_have_is_refused(name: str, tables: Tables) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as raised:
        make(tables)
    assert "\n" not in str(raised.value)


def test_a_table_that_is_no_rotation_is_refused(tmp_path: Path) -> None:
    path = tensors.write(tmp_path / "t.safetensors", {"keys": 2 * torch.eye(4)[None, None]})
    with pytest.raises(UserError, match=r"^table=.*t.safetensors: expected orthogonal rotations, R R\^T differs"):
        codecs.CovarianceRotation(str(path))
