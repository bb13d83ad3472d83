"""Policies that cannot evict while tokens are added are refused."""

from collections.abc import Callable
from typing import Any

import pytest

from learnkv import Policy, load_policy
from learnkv.errors import UserError
from learnkv.scorers import H2O, KVzip, SnapKV


@pytest.mark.parametrize(
    "build", [lambda: Policy(KVzip(), evict_interval=4), lambda: Policy(SnapKV(), evict_interval=4, decode=KVzip())]
)
def test_a_scorer_that_cannot_score_decoded_tokens_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"^evict_interval=4: KVzip reads of a prompt .* another scorer as decode"):
        build()
    assert Policy(KVzip(), evict_interval=4, decode=H2O()).capture_spec.statistics


def test_an_allocator_that_reads_the_queries_of_a_prompt_is_refused() -> None:
    flux = load_policy("flux_attention")
    with pytest.raises(UserError, match=r"^evict_interval=7: FluxAttention reads the queries of a prompt; expected 0$"):
        Policy(flux.scorer, flux.allocator, evict_interval=7)
