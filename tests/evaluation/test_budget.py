"""Budgets as they are typed, shown and recorded, and the precisions of baselines."""

from typing import Any

import pytest

from learnkv.errors import UserError
from learnkv.evaluation.budget import Budget, bytes_budget, with_unit
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.precisions import parse_precision


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        (0.05, "bytes 0.05"),
        (1.0, "bytes 1"),
        ("64MB", "bytes 64MB"),
        ("512KB", "bytes 512KB"),
        (65536.0, "bytes 64KB"),
        (65537.0, "bytes 65537"),
        (1 / 3, "bytes 0.333333333333"),
    ],
)
def test_a_budget_of_bytes_is_shown_as_it_is_typed(typed: float | str, shown: str) -> None:
    assert str(bytes_budget(typed)) == shown


@pytest.mark.parametrize("typed", [0.0, -0.1, 1.5, float("nan"), float("inf"), "64XB", "MB", "0MB", ""])
def test_what_is_no_number_of_bytes_is_refused(typed: float | str) -> None:
    with pytest.raises(UserError, match="bytes="):
        EvalConfig(bytes=(typed,))


def test_fractions_and_numbers_are_not_one_budget() -> None:
    config = EvalConfig(bytes=(0.05, "64KB", 0.1, 65536.0, "1MB"), keep=(0.5,), budget=(8,))
    assert list(map(str, config.budgets)) == [
        "keep 0.5",
        "budget 8",
        "bytes 0.1",
        "bytes 0.05",
        "bytes 1MB",
        "bytes 64KB",
    ]
    assert [one.keep for one in EvalConfig().budgets] == [0.5, 0.25, 0.1, 0.05]
    assert list(map(str, EvalConfig(bytes=(0.05,)).budgets)) == ["bytes 0.05"]


def test_what_is_asked_of_a_prompt() -> None:
    assert Budget(keep=0.5).asked_bytes(1000) is None
    assert Budget(tokens=8).fraction(32, 1000) == 0.25
    assert (Budget(bytes=0.0255).asked_bytes(1000), Budget(bytes=0.0255).fraction(32, 1000)) == (25, 0.0255)
    assert (Budget(bytes=250).asked_bytes(1000), Budget(bytes=250).fraction(32, 1000)) == (250, 0.25)
    assert (Budget(bytes=2000).asked_bytes(1000), Budget(bytes=2000).fraction(32, 1000)) == (2000, 1.0)


@pytest.mark.parametrize("count", [1, 1023, 2**10, 3 * 2**20, 2**30, 2**20 + 2**10])
def test_a_unit_loses_nothing(count: int) -> None:
    assert bytes_budget(with_unit(count) if count >= 2**10 else float(count)).asked_bytes(1) == count


@pytest.mark.parametrize(
    ("typed", "means"), [(4, 4), ("16", 16), ("K4V3", {"keys": 4, "values": 3}), ("k8v2", {"keys": 8, "values": 2})]
)
def test_a_precision_is_bits_of_both_or_of_each(typed: Any, means: Any) -> None:
    assert parse_precision(typed) == means


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"precision": (5,)}, "precision=5: expected 16, 8, 4, 3, 2 bits, or K4V3 for keys and values"),
        ({"precision": ("K4V5",)}, "precision=K4V5: expected 16"),
        ({"precision": ("K4",)}, "precision=K4: expected bits such as 4 or K4V3"),
        ({"precision": (4, "4")}, "precision=4,4: expected different ones"),
        ({"precision": ("K4V3", "k4v3")}, "precision=K4V3,k4v3: expected different ones"),
        ({"precision": (4,), "baselines": ()}, "precision=4: expected baselines= to run at it, got none"),
        ({"precision": (4,), "keep": ()}, "precision=4: expected keep= or bytes=, got neither"),
        ({"precision": (4,), "budget": (8,)}, "precision=4: expected keep= or bytes=, got budget="),
    ],
)
def test_precisions_that_cannot_be_run_are_one_line(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        EvalConfig(**{"baselines": ("snapkv",), "keep": (0.5,), **keys})
    assert str(refused.value).startswith(line)
