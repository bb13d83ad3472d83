"""Budgets from files as deployed; their roundings in print are in the golden tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tables import made_up
from torch import Tensor

from learnkv.allocators import (
    LUKV,
    CompressKV,
    DuoAttention,
    FixedLayers,
    FluxAttention,
    HeadKV,
    HeteroCache,
    NLLLayers,
)
from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.formats import duo, headkv, heterocache, layers, lukv
from learnkv.ops.head_taxonomy import Taxonomy

INF = torch.inf


def wishes(
    allocator: Allocator, budget: float, layers: int, heads: int, entries: int = 1000, protected: int = 0
) -> Tensor:
    """[L, H] for one row."""
    scores = torch.zeros(layers, 1, heads, entries)
    scores[..., entries - protected :] = INF
    return allocator(scores, None, torch.tensor([budget], dtype=torch.float64))[:, 0]


def test_headkv_deals_out_a_pool_by_scores_and_the_rest_equally(tmp_path: Path) -> None:
    file = headkv.write(tmp_path / "scores.json", [[[1.0], [3.0], [0.0], [0.0]], [[2.0, 4.0], [1.0], [0.0], [0.0]]])
    allocator = HeadKV(str(file), beta=2)
    assert allocator.importance.flatten().tolist() == pytest.approx([0.125, 0.375, 0, 0, 0.375, 0.125, 0, 0])
    # 20 free entries per query head: 10 for everybody, a pool of 80 by the scores
    assert wishes(allocator, 23, 2, 4, protected=3).flatten().tolist() == pytest.approx(
        [3 + 20, 3 + 40, 13, 13, 3 + 40, 3 + 20, 13, 13]
    )
    of_groups = wishes(allocator, 23, 2, 2, protected=3)
    assert of_groups.flatten().tolist() == pytest.approx([3 + 30, 13, 3 + 30, 13])


def test_headkv_s_original_pool_is_a_floating_point_quotient(tmp_path: Path) -> None:
    """143 // 1.1 is 129, although 143 / 1.1 is 130."""
    file = headkv.write(tmp_path / "scores.json", [[[1.0], [0.0]]])
    allocator = HeadKV(str(file), beta=1.1, rounding="original")
    assert wishes(allocator, 143, 1, 2).tolist() == [[2 * 129 + 14, 14]]


@pytest.mark.parametrize(
    ("change", "told"), [({"beta": 0.5}, "beta=0.5"), ({"scores": "no/such.json"}, "no/such.json")]
)
def test_headkv_tells_what_is_wrong(change: dict[str, float | str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        HeadKV(**{"scores": made_up("scores", 2, 2, 2), **change})


def test_headkv_wants_scores_that_can_be_shared(tmp_path: Path) -> None:
    file = headkv.write(tmp_path / "scores.json", [[[-1.0], [3.0]]])
    with pytest.raises(UserError, match="at least 0"):
        HeadKV(str(file))


GATES = torch.tensor([[0.9, 0.1, 0.4], [1.02, -0.1, 0.4]], dtype=torch.float64)


def duo_attention(tmp_path: Path, **arguments: Any) -> DuoAttention:
    return DuoAttention(str(duo.write(tmp_path, GATES, 4, 16)), **arguments)


def test_duo_attention_fills_heads_by_their_gates(tmp_path: Path) -> None:
    allocator = duo_attention(tmp_path)
    assert (allocator.sink, allocator.recent) == (4, 16)
    assert allocator.gates.flatten().tolist() == [0.9, 0.1, 0.4, 1, 0, 0.4]
    # 6 heads of 20, and 1700 more: one head of 1000, and 720 of the next
    assert wishes(allocator, (6 * 20 + 980 + 700) / 6, 2, 3).tolist() == [[720, 20, 20], [1000, 20, 20]]
    assert wishes(allocator, (6 * 20 + 2 * 980 + 30) / 6, 2, 3).flatten().tolist() == pytest.approx(
        [1000, 20, 50, 1000, 20, 20]  # of two equal gates the lower layer's comes first
    )
    assert wishes(allocator, 15, 2, 3).flatten().tolist() == [15] * 6
    assert wishes(allocator, 9, 2, 3, entries=12).flatten().tolist() == [9] * 6


def test_duo_attention_with_a_given_sparsity(tmp_path: Path) -> None:
    """The quantile of 6 gates at 0.5 lies between the 3rd and the 4th, at 0.55 between the 3rd and the 4th as well."""
    assert duo_attention(tmp_path, sparsity=0.5).streaming().tolist() == [[False, True, False], [False, True, True]]
    assert duo_attention(tmp_path, sparsity=0.61).streaming().sum() == 4
    assert duo_attention(tmp_path, sparsity=0.61, counting="kvpress").streaming().sum() == 4
    assert duo_attention(tmp_path, sparsity=0.65).streaming().sum() == 4
    assert duo_attention(tmp_path, sparsity=0.45).streaming().sum() == 3
    assert duo_attention(tmp_path, sparsity=0.45, counting="kvpress").streaming().sum() == 3
    assert duo_attention(tmp_path, sparsity=0.41, counting="kvpress").streaming().sum() == 2
    assert duo_attention(tmp_path, sparsity=0.0).streaming().sum() == 0
    assert duo_attention(tmp_path, sparsity=1.0).streaming().all()
    assert wishes(duo_attention(tmp_path, sparsity=0.5), 9, 2, 3).tolist() == [[1000, 20, 1000], [1000, 20, 20]]


def test_lukv_takes_the_row_of_the_nearest_target(tmp_path: Path) -> None:
    curve = (torch.arange(99.0).view(-1, 1, 1) / 100).repeat(1, 1, 2)
    curve[:, :, 1] = 1.5  # beyond all of it
    allocator = LUKV(str(lukv.write(tmp_path / "curve.npy", curve)))
    for keep, row in ((0.995, 0), (0.855, 13), (0.875, 11), (0.5, 49), (0.02, 97), (0.005, 98)):
        assert wishes(allocator, 1000 * keep, 1, 2).flatten().tolist() == pytest.approx([1000 - 10 * row, 0], abs=1e-3)


def test_fixed_layers_are_proportions(tmp_path: Path) -> None:
    allocator = FixedLayers(str(layers.write(tmp_path / "layers.json", [3, 1])))
    assert wishes(allocator, 10, 2, 3).tolist() == [[15] * 3, [5] * 3]


def test_compresskv_gives_a_minimum_and_the_rest_by_errors(tmp_path: Path) -> None:
    file = str(layers.write(tmp_path / "errors.json", [8, 1, 1, 0]))
    assert wishes(CompressKV(file, minimum=32), 132, 4, 1).flatten().tolist() == pytest.approx([352, 72, 72, 32])
    assert wishes(CompressKV(file, minimum=32), 40, 4, 1).flatten().tolist() == pytest.approx([84, 28, 28, 20])
    assert wishes(CompressKV(file, minimum=0), 100, 4, 1).flatten().tolist() == pytest.approx([300, 40, 40, 0])
    whole = CompressKV(file, minimum=0, rounding="original")
    # 320, 40, 40, 0; the first one's limit of 300 leaves 20, 6 + 7 + 7 of them after sweeps that begin with the second
    assert wishes(whole, 100, 4, 1).flatten().tolist() == [300, 47, 47, 6]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: HeadKV(made_up("scores", 6, 4, 2)),
            "made for 6 layers of 8 query heads, the model has 3 of 3 kv",
        ),
        (lambda: LUKV(made_up("curve", 3, 6, 1)), "curve=.* made for 3 layers of 6 kv heads, the model has 3 of 3 kv"),
        (lambda: DuoAttention(made_up("gates", 6, 3, 1)), "gates=.* made for 6 layers of 3 kv heads"),
        (
            lambda: CompressKV(made_up("errors", 6, 4, 1)),
            "errors=.* holds 6 layers, the model has 3; .*learnkv calibrate",
        ),
        (lambda: FixedLayers(made_up("budgets", 6, 4, 1)), "budgets=.* holds 6 layers, the model has 3"),
    ],
)
def test_a_table_of_another_model_is_named(make: Callable[..., Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        wishes(make(), 10, 3, 3)


def test_the_shipped_tables_say_whose_they_are() -> None:
    with pytest.raises(UserError, match=r"^scores=reference: made for 6 layers of 8 query heads, .*learnkv calibrate"):
        wishes(HeadKV(), 10, 32, 8)


def test_heads_that_work_against_the_answer_count_as_nothing(tmp_path: Path) -> None:
    """LOCOS' scores have a sign; the best query head of a group may speak for it."""
    file = headkv.write(tmp_path / "scores.json", [[[-5.0], [3.0], [1.0], [0.0]]])
    allocator = HeadKV(str(file), beta=1, table="logit_heads", negative="zero", group_reduce="max")
    assert wishes(allocator, 10, 1, 4).flatten().tolist() == pytest.approx([0, 30, 10, 0])
    assert wishes(allocator, 10, 1, 2).flatten().tolist() == pytest.approx([30, 10])
    assert wishes(HeadKV(str(file), beta=1, negative="zero"), 10, 1, 2).flatten().tolist() == pytest.approx([15, 5])


def test_layers_keep_everything_in_the_order_of_their_gains(tmp_path: Path) -> None:
    """Of 100 entries 10 are the window; 40 on average are 30 more in 3 layers: one whole, none of a second."""
    file = layers.write(tmp_path / "gains.json", [0.5, 2.0, 0.0])
    allocator = NLLLayers(str(file), sink=2, recent=8)
    assert wishes(allocator, 40, 3, 2, entries=100).tolist() == [[10, 10], [100, 100], [10, 10]]
    assert wishes(allocator, 55, 3, 2, entries=100).tolist() == [[55, 55], [100, 100], [10, 10]]
    assert wishes(allocator, 6, 3, 2, entries=100).tolist() == [[6, 6]] * 3
    with pytest.raises(UserError, match="holds 3 layers, the model has 4"):
        wishes(allocator, 6, 4, 2)


def test_pivots_and_volatile_heads_keep_everything(tmp_path: Path) -> None:
    heads = Taxonomy(
        torch.tensor([[3, 4], [1, 2]]),
        torch.tensor([[-1.0, 0.5], [1.5, -1.0]]),
        torch.tensor([[-1, 0], [-1, -1]]),
        [[0], []],
    )
    allocator = HeteroCache(str(heterocache.write(tmp_path / "kinds.json", heads)))
    assert wishes(allocator, 60, 2, 2, entries=100).flatten().tolist() == pytest.approx([100, 10, 30, 100])
    assert wishes(allocator, 40, 2, 2, entries=100).tolist() == [[100, 0], [0, 100]]  # then scaled to the budget
    (tmp_path / "wrong.json").write_text('{"classification_matrix": [[4]]}')
    with pytest.raises(UserError, match="expected the keys"):
        HeteroCache(str(tmp_path / "wrong.json"))


def test_a_router_s_layers_keep_everything(tmp_path: Path) -> None:
    allocator = FluxAttention(made_up("router", 3, 2, 1), pool_size=4, sink=2, recent=8)
    margin = torch.tensor([-1.0, 2.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 1)
    scores, budget = torch.zeros(3, 1, 2, 100), torch.tensor([55.0])
    assert allocator(scores, margin, budget)[:, 0].tolist() == [[10, 10], [100, 100], [55, 55]]
    allocator = FluxAttention(made_up("router", 3, 2, 1), pool_size=4, sink=2, recent=8, decide="router")
    assert allocator(scores, margin, budget)[:, 0].tolist() == [[10, 10], [100, 100], [100, 100]]
    with pytest.raises(UserError, match="made for 3 layers, the model has 2"):
        allocator(scores[:2], margin[:2], budget)
