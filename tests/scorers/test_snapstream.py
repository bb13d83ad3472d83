"""The prompt's entries stay, and the latest tokens are a ring."""

import pytest
from support.models import attached, padded, tokens

from learnkv import Policy, continuation, load_policy, prefill
from learnkv.errors import UserError
from learnkv.scorers import SnapKV, SnapStream

LENGTHS = (60, 41)


@pytest.mark.parametrize("evict_interval", [1, 5])
def test_new_tokens_replace_the_oldest_of_the_ring_and_nothing_else(evict_interval: int) -> None:
    shipped = load_policy("snapstream")
    assert (type(shipped.scorer), type(shipped.decode), shipped.decode.ring) == (SnapKV, SnapStream, shipped.recent)
    policy = Policy(SnapKV(window=16), decode=SnapStream(8), evict_interval=evict_interval)
    model = attached("llama")
    cache = prefill(model, *padded([tokens(1, length)[0] for length in LENGTHS]), policy=policy, keep=0.4)

    def kept(row: int, layer: int, head: int) -> set[int]:
        return set(cache.kept_positions(layer, row, head).tolist())

    heads = [(row, layer, head) for row in (0, 1) for layer in cache.compressible for head in (0, 1)]
    static = {where: {place for place in kept(*where) if place < LENGTHS[where[0]] - 8} for where in heads}
    assert len({frozenset(part) for part in static.values()}) > 6
    for step in range(4):
        continuation(model, tokens(2, 5, seed=step), cache)
        for where in heads:
            read = LENGTHS[where[0]] + 5 * (step + 1)
            assert kept(*where) == static[where] | set(range(read - 8, read))


def test_a_ring_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="ring=0"):
        SnapStream(0)
