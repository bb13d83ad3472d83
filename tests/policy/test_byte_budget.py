"""Budgets in bytes: how they are written, what they hold, what is refused."""

import pytest
import torch
from support.models import HEURISTICS, attached, padded, policy_for, read, tokens

from learnkv import CompressedCache, Policy, load_policy, prefill
from learnkv.allocators import Uniform
from learnkv.codecs import Spherical
from learnkv.errors import UserError
from learnkv.persistence.policies import build_policy
from learnkv.policy.byte_budget import parse_bytes
from learnkv.precision import UniformPrecision
from learnkv.scorers import Knorm, SnapKV

LENGTHS = (57, 40)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (0.05, 0.05),
        ("0.05", 0.05),
        (1, 1.0),
        ("2.5e-2", 0.025),
        ("64MB", 64 * 1024**2),
        ("1.5 kb", 1536),
        ("512B", 512),
        (4096, 4096),
        ("2GB", 2 * 1024**3),
    ],
)
def test_fractions_and_bytes(text: float | str, want: float) -> None:
    got = parse_bytes(text)
    assert got == want
    assert isinstance(got, type(want))


@pytest.mark.parametrize("text", [0, -0.1, "64TB", "MB", "0.5.1", "", True, "0KB", "nan", float("inf")])
def test_other_numbers_are_refused(text: float | str) -> None:
    with pytest.raises(UserError, match=r"bytes=.*expected a fraction of the 16-bit cache"):
        parse_bytes(text)


@pytest.fixture(scope="module")
def whole() -> CompressedCache:
    """Two prompts, read once for all methods."""
    return read(attached("llama"), *padded([tokens(1, length)[0] for length in LENGTHS]))


@pytest.mark.parametrize("name", HEURISTICS)
@pytest.mark.parametrize("precision", [None, 4])
def test_every_method_spends_the_bytes_it_was_given(name: str, precision: int | None, whole: CompressedCache) -> None:
    """To within an entry of each row, and in fewer entries where these have 16 bits."""
    policy = policy_for(name, attached("llama"))
    if policy.pages is not None:
        pytest.skip("reads pages, evicts nothing")
    policy = policy if precision is None else policy.with_precision(precision)
    asked, full = 0.25, [2 * 2 * 16 * 2 * 3 * n for n in LENGTHS]
    compressed = policy.compress(whole.fork(), bytes=asked)
    entry = 68 if precision is None else 2 * (8 + 4) + 4
    assert compressed.row_full_nbytes() == full
    assert compressed.nbytes == sum(compressed.row_nbytes())
    for held, of_row in zip(compressed.row_nbytes(), full, strict=True):
        assert int(asked * of_row) - entry < held <= asked * of_row


def test_entries_of_16_bits_are_stored_as_they_are_where_the_model_has_16_bits() -> None:
    model = attached("llama")
    policy = Policy(Knorm(), sinks=2, recent=3)
    cache = prefill(model, tokens(1, 57), policies=[policy])
    wide = policy.compress(cache.fork(), bytes=0.3)
    assert wide.compressed_layers()[0].state.tiers[0].keys.tensors["entries"].dtype == torch.float16
    for layer in cache.compressed_layers():
        layer.state.prompt.__dict__.update(keys=layer.prompt.keys.bfloat16(), values=layer.prompt.values.bfloat16())
        layer.dtype, layer.token_nbytes = torch.bfloat16, layer.token_nbytes // 2
    narrow = policy.compress(cache, bytes=0.3)
    assert narrow.compressed_layers()[0].state.tiers == ()
    assert narrow.compressed_layers()[0].segment.keys.dtype == torch.bfloat16
    assert 0.3 * narrow.full_nbytes - 68 < narrow.nbytes <= 0.3 * narrow.full_nbytes


def test_the_precision_of_a_policys_file() -> None:
    """Bits, bits of keys and values, and a class; written and read again."""
    scorer = {"class_path": "learnkv.scorers.Knorm"}
    for precision, label in (
        (4, "4"),
        ({"keys": 4, "values": 3}, "K4V3"),
        ({"class_path": "learnkv.precision.UniformPrecision", "init_args": {"keys": 8, "values": 2}}, "K8V2"),
        (None, "16"),
    ):
        policy = build_policy({"scorer": scorer, "precision": precision})
        assert policy.precision_name == label
        assert build_policy(policy.spec()).precision_name == label
        assert policy.with_precision(8).precision_name == "8"
        assert build_policy(policy.with_precision(8).spec()).precision_name == "8"


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (5, "expected 16, 8, 4, 3, 2 bits"),
        ({"keys": 4}, "expected bits such as 4"),
        ({"keys": 4, "values": 3, "other": 1}, "expected bits such as 4"),
    ],
)
def test_other_precisions_are_refused(precision: int | dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy(Knorm(), precision=precision)


def test_what_does_not_go_together_is_named() -> None:
    ids = tokens(1, 57)
    with pytest.raises(UserError, match="H2O holds statistics of every entry"):
        _compress(load_policy("h2o_decode"))
    with pytest.raises(UserError, match=r"bytes=0\.3: rerotate=end holds a second position of every entry"):
        _compress(Policy(Knorm(), rerotate="end"))
    with pytest.raises(UserError, match="pages=Quest precision=4: not supported together"):
        load_policy("quest").with_precision(4)
    with pytest.raises(UserError, match="stores keys before RoPE"):
        UniformPrecision(_before_rope(), 4)
    model = attached("llama")
    policy = Policy(SnapKV(window=8), Uniform(), sinks=2, recent=3)
    cache = prefill(model, ids, policies=[policy])
    with pytest.raises(UserError, match="expected exactly one of them"):
        policy.compress(cache.fork(), keep=0.5, bytes=0.5)
    with pytest.raises(UserError, match=r"bytes=218: hold 0\.\d+ entries per head of 68 bytes"):
        policy.compress(cache.fork(), bytes=0.01)
    with pytest.raises(UserError, match="24 channels have no Hadamard matrix"):
        _of_other_size(policy.with_precision(4))


def _compress(policy: Policy) -> None:
    policy.compress(prefill(attached("llama"), tokens(1, 57), policies=[policy]), bytes=0.3)


def _before_rope() -> Spherical:
    codec = Spherical.__new__(Spherical)
    torch.nn.Module.__init__(codec)
    return codec


def _of_other_size(policy: Policy) -> None:
    from support.models import build

    from learnkv import attach

    model = attach(build("llama", head_dim=24))
    policy.compress(prefill(model, tokens(1, 57), policies=[policy]), bytes=0.3)
