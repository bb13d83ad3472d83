"""Quest's two rules by hand; the golden files hold the numbers of the originals."""

import pytest
import torch

from learnkv.errors import UserError
from learnkv.pages import Quest

# Keys with a single channel: pages of two with these bounds; a query of 1 looks for large keys, of -1 for small ones.
BOUNDS = torch.tensor([[[-9.0], [1.0], [0.0], [2.0], [-1.0]], [[0.0], [3.0], [7.0], [4.0], [0.0]]])[None, None]


def pages(selector: Quest, query: list[float], tokens: int) -> list[list[int]]:
    asked = torch.tensor(query).view(1, -1, 1)
    entries, budget = torch.tensor([[9]]), torch.tensor([tokens])
    return selector(asked, BOUNDS, entries, budget, min(selector.most(tokens), 5)).tolist()


def test_the_kernels_always_read_the_last_page() -> None:
    quest = Quest(page_size=2, rule="kernel")
    assert pages(quest, [1.0], 2) == [[4]]
    assert pages(quest, [1.0], 5) == [[2, 4]]
    assert pages(quest, [-1.0], 4) == [[0, 4]]
    assert pages(quest, [1.0], 1) == [[4]]  # never nothing
    assert pages(quest, [1.0], 100) == [[0, 1, 2, 3, 4]]


def test_in_the_accuracy_experiments_the_last_page_competes_and_three_are_read_at_least() -> None:
    quest = Quest(page_size=2, rule="accuracy")
    assert pages(quest, [1.0], 2) == [[1, 2, 3]]
    assert pages(quest, [1.0], 8) == [[0, 1, 2, 3]]  # the first of two with a bound of 0
    assert pages(quest, [1.0], 100) == [[0, 1, 2, 3, -1]]  # half a page is not a page


def test_query_heads_share_pages_or_have_their_own() -> None:
    assert pages(Quest(2, "kernel", "none"), [1.0, -1.0], 4) == [[2, 4], [0, 4]]
    assert pages(Quest(2, "kernel", "max"), [1.0, -1.0], 4) == [[0, 4]]
    assert pages(Quest(2, "kernel", "mean"), [1.0, -1.0], 4) == [[0, 4]]  # (0 + 9) / 2 against (7 + 0) / 2


@pytest.mark.parametrize("wrong", [{"page_size": 0}, {"dense_layers": -1}])
def test_wrong_numbers_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Quest(**wrong)
