"""Kinds of heads, gains of layers and routers, measured of the reference model on few and short contexts."""

import pytest
import torch
from support.models import Loaded

from learnkv import load_model
from learnkv.calibration.head_kinds import head_kinds
from learnkv.calibration.layer_gains import layer_gains
from learnkv.calibration.layer_router import layer_router
from learnkv.calibration.trials import Trial, sample_trials
from learnkv.formats import heterocache, layers, tensors
from learnkv.formats.files import TABLES
from learnkv.ops.head_taxonomy import taxonomy
from learnkv.ops.layer_router import router_shapes


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model("reference")


@pytest.fixture(scope="module")
def trials(loaded: Loaded) -> list[Trial]:
    return list(sample_trials(loaded[1], 128, 2, seed=3))


def test_upper_layers_gain_an_answer_most(loaded: Loaded, trials: list[Trial]) -> None:
    gains = layer_gains(loaded[0], trials[:1], sink=4, recent=12)
    assert gains.shape == (6,)
    assert gains[4:].sum() > 10 * gains[:4].sum()  # where the retrieval heads are
    shipped = layers.read(TABLES / "layer_gains.json")
    assert set(shipped.topk(2).indices.tolist()) == {4, 5}


def test_kinds_of_all_heads_follow_the_threshold(loaded: Loaded, trials: list[Trial]) -> None:
    model = loaded[0]
    everything_moves, nothing_moves = (head_kinds(model, trials, stable) for stable in (1.1, 0.0))
    assert everything_moves.kinds.shape == (6, 4)
    assert not (everything_moves.kinds == 1).any()
    assert not (nothing_moves.kinds == 2).any()
    assert torch.equal(everything_moves.pivots, nothing_moves.pivots)  # satellites do not depend on it
    assert int(heterocache.read(TABLES / "head_kinds.json").full.sum()) == 4


def test_heads_without_a_like_are_alone_and_ties_go_to_the_lower_head() -> None:
    sets = torch.zeros(1, 5, 8, dtype=torch.bool)
    for head, entries in enumerate(([0, 1], [0, 2], [2, 3], [3, 4], [6, 7])):
        sets[0, head, entries] = True
    found = taxonomy([[sets, sets]], similar=0.5)
    assert found.kinds.tolist() == [[4, 3, 4, 1, 1]]  # head 1 is like 0 and 2, head 2 like 1 and 3
    assert found.pivots.tolist() == [[1, -1, 1, -1, -1]]
    assert found.weights[0, [0, 2, 3, 4]].tolist() == pytest.approx([1.0] * 4)


def test_a_router_has_the_shapes_of_its_model_and_learns(loaded: Loaded, trials: list[Trial]) -> None:
    first, second = (layer_router(loaded[0], trials, 4, 12, steps, pool_size=8) for steps in (1, 2))
    assert {name: tuple(weight.shape[1:]) for name, weight in first.items()} == router_shapes(32)
    assert all(bool((first[name] != weight).any()) for name, weight in second.items())
    assert tensors.read(TABLES / "layer_router.safetensors", tensors.LAYER_ROUTER)["f.0.weight"].shape == (6, 256, 32)
