"""Sizes after the output projection against the projection itself."""

import pytest
import torch

import learnkv.ops.output_projection as module
from learnkv.ops.output_projection import isometries, projected_l1, projected_l2


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("at_once", [1, 100, 2**24])
def test_l1_norms_are_those_of_every_query_heads_part(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    values, weight = drawn(2, 3, 7, 4), drawn(10, 3 * 2 * 4)
    norms = projected_l1(values, weight)
    assert norms.shape == (2, 3, 2, 7)
    for head in range(3):
        for member in range(2):
            at = (head * 2 + member) * 4
            want = (values[:, head] @ weight[:, at : at + 4].T).abs().sum(-1)
            torch.testing.assert_close(norms[:, head, member], want)


def test_l2_norms_are_those_of_every_query_heads_part() -> None:
    values, weight = drawn(2, 3, 7, 4), drawn(10, 3 * 2 * 4)
    norms = projected_l2(values, weight)
    assert norms.shape == (2, 3, 2, 7)
    for head in range(3):
        for member in range(2):
            at = (head * 2 + member) * 4
            torch.testing.assert_close(
                norms[:, head, member], (values[:, head] @ weight[:, at : at + 4].T).norm(dim=-1)
            )


@pytest.mark.parametrize("outputs", [3, 4, 50])
def test_isometries_measure_as_the_projection_does(outputs: int) -> None:
    weight, vectors = drawn(outputs, 6 * 4), drawn(6, 9, 4)
    small = isometries(weight, 6)
    assert small.shape == (6, min(outputs, 4), 4)
    want = torch.einsum("ned,nsd->nse", weight.unflatten(1, (6, 4)).transpose(0, 1), vectors).norm(dim=-1)
    torch.testing.assert_close(torch.einsum("ned,nsd->nse", small, vectors).norm(dim=-1), want)
