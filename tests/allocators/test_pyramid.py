"""The pyramid as deployed; its tables in print are in the golden tests."""

import pytest
import torch

from learnkv.allocators import Pyramid
from learnkv.errors import UserError

ROUNDINGS = ["exact", "original", "adakv", "kvpress"]


def table(pyramid: Pyramid, layers: int, budget: list[float], entries: int = 1000) -> torch.Tensor:
    """Entries [L, B]; the same in both heads."""
    wanted = pyramid(torch.zeros(layers, len(budget), 2, entries), None, torch.tensor(budget, dtype=torch.float64))
    assert torch.equal(wanted[..., 0], wanted[..., 1])
    return wanted[..., 0]


def test_an_arithmetic_progression_down_to_a_share_of_beta() -> None:
    got = table(Pyramid(beta=20, protected=12), 5, [112.0])
    assert got.flatten().tolist() == pytest.approx([12 + 195, 12 + 147.5, 12 + 100, 12 + 52.5, 12 + 5])


@pytest.mark.parametrize("layers", [1, 2, 7, 80])
@pytest.mark.parametrize("entries", [60, 150, 1000])
def test_exact_spends_the_budget(layers: int, entries: int) -> None:
    budgets = [1.0, 5.5, 12.0, 24.0, 37.3, 59.0]
    got = table(Pyramid(), layers, budgets, entries)
    torch.testing.assert_close(got.mean(0), torch.tensor(budgets, dtype=torch.float64))
    assert (got >= 0).all()


def test_the_first_layer_gets_no_more_than_there_is() -> None:
    got = table(Pyramid(protected=10), 3, [60.0], entries=80).flatten()
    assert got.tolist() == pytest.approx([80, 60, 40])


def test_original_tables_overspend_and_exact_does_not() -> None:
    """The published floor of the step costs a quarter more than asked for in 80 layers."""
    over = {rounding: table(Pyramid(20, 8, rounding), 80, [64.0]).sum() / (80 * 64) for rounding in ROUNDINGS[:3]}
    assert over["exact"] == pytest.approx(1)
    assert over["original"] == over["adakv"]
    assert 1.2 < over["original"] < 1.3


def test_short_prompts_are_flat_in_the_original_only() -> None:
    assert table(Pyramid(20, 8, "original"), 4, [64.0], entries=111).flatten().tolist() == [64, 64, 64, 64]
    assert table(Pyramid(20, 8, "adakv"), 4, [64.0], entries=111).flatten().tolist() == [111, 80, 49, 18]


def test_kvpress_counts_the_window_inside_the_progression() -> None:
    assert table(Pyramid(20, 64, "kvpress"), 4, [256.0], entries=512).flatten().tolist() == [448, 320, 192, 64]
    assert table(Pyramid(20, 64, "kvpress"), 4, [128.0], entries=512).flatten().tolist() == [128, 128, 128, 128]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_beta_one_is_flat(rounding: str) -> None:
    assert table(Pyramid(1, 8, rounding), 6, [40.0]).flatten().tolist() == [40] * 6


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rows_of_a_batch_do_not_meet(rounding: str) -> None:
    budgets, entries = [20.0, 64.0, 90.0], [30, 111, 200]
    scores = torch.zeros(4, 3, 1, 200)
    for row, n in enumerate(entries):
        scores[:, row, :, : 200 - n] = -torch.inf
    pyramid = Pyramid(20, 8, rounding)
    together = pyramid(scores, None, torch.tensor(budgets, dtype=torch.float64))
    for row in range(3):
        alone = table(pyramid, 4, [budgets[row]], entries[row])
        assert torch.equal(together[:, row, 0], alone[:, 0])


@pytest.mark.parametrize(("arguments", "word"), [({"beta": 0}, "beta=0"), ({"protected": -1}, "protected=-1")])
def test_what_makes_no_sense_is_refused(arguments: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Pyramid(**arguments)
