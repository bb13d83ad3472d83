"""Features in the cache are found by an explicit key."""

import copy
import dataclasses

import torch
from support.observations import observe, randomised
from torch import Tensor

from learnkv.core.feature_cache import CachedFeatures, FeatureKey
from learnkv.core.observation import Observation
from learnkv.scorers import Constant, GateScorer, HiddenScorer

KEY = FeatureKey("a", 1)


def norms(obs: Observation) -> Tensor:
    return obs.hidden.norm(dim=-1)[:, None, :, None]


def test_nothing_but_the_key_is_compared() -> None:
    one, other = CachedFeatures(KEY, norms, True), CachedFeatures(FeatureKey("a", 1), lambda obs: obs.keys, False)
    assert one == other
    assert hash(one) == hash(other)
    assert one != CachedFeatures(FeatureKey("a", 2), norms, True)
    assert copy.deepcopy(one) is one


def test_features_of_chunks_are_those_of_the_prompt() -> None:
    whole, features = observe([30]), CachedFeatures(KEY, norms, True)
    want, gathered = norms(whole), None
    for begin, end in ((0, 11), (11, 12), (12, 30)):
        read = {name: getattr(whole, name)[:, :, :end] for name in ("keys", "values", "valid", "positions")}
        queries, hidden = whole.keys[:, :, begin:end], whole.hidden[:, :end]
        gathered = features.update(dataclasses.replace(whole, queries=queries, hidden=hidden, **read), gathered)
    assert torch.equal(gathered, want)


def test_the_key_follows_class_settings_and_weights() -> None:
    scorer = randomised(HiddenScorer(Constant(), 2, 2, 16, 32, width=3))
    assert scorer.feature_key == copy.deepcopy(scorer).feature_key == scorer.feature_key
    before = scorer.feature_key
    plain = HiddenScorer(Constant(), 2, 2, 16, 32, width=3, normalized=False)
    plain.load_state_dict(scorer.state_dict())
    assert plain.feature_key.weights == before.weights
    assert plain.feature_key != before
    with torch.no_grad():
        scorer.bias[0, 0, 0].add_(1)
    assert scorer.feature_key != before
    with torch.no_grad():
        scorer.bias[0, 0, 0].sub_(1)
    assert scorer.feature_key == before
    assert randomised(GateScorer(Constant(), 2, 2, 32, num_groups=2)).feature_key != before
