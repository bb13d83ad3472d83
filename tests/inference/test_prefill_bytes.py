"""`prefill(bytes=)`: what is kept, and in how many bits, is what compressing the complete prompt keeps."""

from typing import Any

import pytest
import torch
from support.models import attached, kept, padded, policy_for, tokens

from learnkv import Policy, continuation, load_policy, prefill
from learnkv.allocators import LayerByLayer
from learnkv.errors import UserError
from learnkv.scorers import H2O, SnapKV

LENGTHS = (97, 60, 41)


@pytest.mark.parametrize("precision", [None, 16, 4, {"keys": 4, "values": 3}])
@pytest.mark.parametrize("name", ["pyramidkv", "causal", "adakv", "knorm"])
def test_bytes_while_reading_are_bytes_afterwards(name: str, precision: Any) -> None:
    model = attached("llama")
    policy = policy_for(name, model).with_precision(precision)
    prompts = padded([tokens(1, length)[0] for length in LENGTHS])
    dense = prefill(model, *prompts, policies=[policy])
    for asked in (0.4, "6KB"):
        ours = prefill(model, *prompts, policy=policy, bytes=asked)
        theirs = policy.compress(dense.fork(), bytes=asked)
        assert ours.row_nbytes() == theirs.row_nbytes()
        assert ours.nbytes == theirs.nbytes == sum(ours.row_nbytes())
        assert ours.full_nbytes == theirs.full_nbytes == sum(ours.row_full_nbytes())
        most = [int(asked * full) if isinstance(asked, float) else 6144 for full in ours.row_full_nbytes()]
        assert all(held <= limit for held, limit in zip(ours.row_nbytes(), most, strict=True))
        assert [kept(ours, row) for row in range(3)] == [kept(theirs, row) for row in range(3)]
        with torch.no_grad():
            said = tokens(3, 5, seed=1)
            assert torch.equal(continuation(model, said, ours), continuation(model, said, theirs))


def test_every_entry_in_fewer_bits() -> None:
    """keep=1 with a precision is not the full cache."""
    model, policy = attached("llama"), Policy(SnapKV(), precision=4)
    ours = prefill(model, tokens(1, 97), policy=policy, keep=1)
    assert ours.spent == [1.0]
    assert ours.row_nbytes() < ours.row_full_nbytes()


@pytest.mark.parametrize(
    ("name", "keys", "line"),
    [
        ("snapkv", {"bytes": 0.5, "keep": 0.5}, "expected exactly one of them"),
        ("snapkv", {"bytes": "64XB"}, "bytes=64XB"),
        ("snapkv", {"bytes": 0.0001}, "expected at least one"),
        ("pyramidkv", {"bytes": 0.0001}, "expected at least one"),
        ("quest", {"bytes": 0.5}, "expected a policy without pages"),
        ("h2o_decode", {"bytes": 0.5}, "bytes=0.5: H2O holds statistics of every entry"),
        ("full", {"bytes": 0.5}, "without a scorer keeps every entry"),
    ],
)
def test_what_cannot_be_met_is_refused(name: str, keys: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        prefill(attached("llama"), tokens(1, 97), policy=load_policy(name), **keys)


def test_a_static_policy_that_holds_more_while_generating_is_refused_before_reading() -> None:
    policy = Policy(H2O(), LayerByLayer(), evict_interval=8)
    assert policy.reads_once
    with pytest.raises(UserError, match=r"bytes=0\.5: H2O holds statistics of every entry"):
        prefill(attached("llama"), tokens(1, 97), policy=policy, bytes=0.5)
