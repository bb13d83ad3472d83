"""Policies that store everything in fewer bits, as their YAML has them, on the reference model."""

import functools

import pytest
import torch
from support.models import padded

from learnkv import CompressedCache, continuation, load_model, load_policy, prefill
from learnkv.persistence.methods import select_methods

NAMES = [name for name in select_methods(["precision"]) if load_policy(name).scorer is None]
LENGTHS = (600, 20)


@functools.cache
def read() -> tuple[object, CompressedCache, list[torch.Tensor]]:
    model, _ = load_model("reference")
    rows = [torch.randint(5, 700, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    return model, prefill(model, *padded(rows), policies=[load_policy(name) for name in NAMES]), rows


@pytest.mark.parametrize("name", NAMES)
def test_fewer_bytes_and_a_row_of_a_batch_is_the_row_alone(name: str) -> None:
    model, cache, rows = read()
    policy, question = load_policy(name), torch.tensor([[7, 8, 9]])
    small = policy.compress(cache.fork(), keep=1)
    assert small.nbytes < 0.95 * small.full_nbytes
    together = continuation(model, question.expand(2, -1), small)
    short = policy.compress(prefill(model, rows[1][None], policies=[policy]), keep=1)
    torch.testing.assert_close(together[1], continuation(model, question, short)[0], rtol=0, atol=2e-3)


def test_channels_are_chosen_by_as_many_queries_as_the_codec_reads() -> None:
    assert load_policy("think").capture_spec.window == 32
