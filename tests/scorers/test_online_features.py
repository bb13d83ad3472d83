"""Online eviction by scorers that read hidden states: their cached features are kept, hidden states are not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import attached, tokens
from support.observations import randomised
from torch import Tensor

from learnkv import Policy, continuation, prefill
from learnkv.cache.capture import Capture
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.scorers import Constant, GateScorer, HiddenScorer, Scorer, SnapKV
from learnkv.scorers.residual import unit

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_token_is_scored_by_its_hidden_state_when_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its score is its own and no heuristic's: what is kept after any number of evictions are the best of all."""
    model, scorer = attached("llama"), randomised(HiddenScorer(Constant(), 3, 2, 16, 48, width=0))
    heard: dict[Any, Any] = {}
    record = Capture.record

    def listen(self: Any, hidden: Tensor, after_prompt: bool = False) -> None:
        heard.setdefault(id(self), []).append(hidden)
        record(self, hidden, after_prompt)

    monkeypatch.setattr(Capture, "record", listen)
    cache = prefill(model, tokens(1, 40), policy=Policy(scorer, sinks=0, recent=0, evict_interval=5), budget=12)
    for said in tokens(1, 23, seed=1).split(1, 1):
        continuation(model, said, cache)
    assert cache.tail_length == 3
    for layer, parts in enumerate(heard.values()):
        scores = (unit(torch.cat(parts, 1)[0, :60]) @ scorer.weight_out[layer]).T
        best = scores.topk(12).indices.sort().values.tolist()
        assert [cache.kept_positions(layer, 0, head).tolist() for head in (0, 1)] == best
        assert max(max(one) for one in best) >= 40


def test_hidden_states_are_not_held_where_nothing_is_scored_again() -> None:
    """Not where a policy keeps all later tokens, nor where their scorer does not read hidden states."""
    gate = randomised(GateScorer(SnapKV(window=8), 3, 2, 48, num_groups=2))
    for policy, held in (
        (Policy(gate), [False] * 3),
        (Policy(gate, evict_interval=9, decode=SnapKV(window=8)), [False] * 3),
        (Policy(gate, evict_interval=9), [True] * 3),
    ):
        cache = prefill(attached("llama"), tokens(1, 40), policy=policy, budget=12)
        continuation(attached("llama"), tokens(1, 4), cache)
        recorders = [layer.capture for layer in cache.compressed_layers()]
        assert [one.hidden for one in recorders] == [None] * 3
        assert [one.unread_hidden is not None for one in recorders] == held
        assert [bool(layer.segment.statistics) for layer in cache.compressed_layers()] == held
        cache.crop(-1)
        assert all(one.unread_hidden is None or one.unread_hidden.shape[1] == 3 for one in recorders)


class Hidden(Scorer):
    """Reads hidden states and does not cache features."""

    needs = frozenset({"hidden"})

    def forward(self, obs: Observation) -> Any:
        return obs.hidden.norm(dim=-1).unsqueeze(1).expand_as(obs.valid)


def test_a_scorer_that_needs_hidden_states_themselves_is_refused() -> None:
    with pytest.raises(UserError, match=r"^evict_interval=4: Hidden reads of a prompt .* another scorer as decode"):
        Policy(Hidden(), evict_interval=4)
