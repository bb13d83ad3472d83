"""Hadamard matrices, and the sizes that have none here."""

import pytest
import torch

from learnkv.errors import UserError
from learnkv.ops.hadamard import hadamard


@pytest.mark.parametrize("dim", [1, 2, 16, 128])
def test_it_is_its_own_inverse_and_has_one_magnitude(dim: int) -> None:
    matrix = hadamard(dim)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim))
    assert torch.equal(matrix, matrix.T)
    assert (matrix.abs() == dim**-0.5).all()


@pytest.mark.parametrize("dim", [0, 3, 80, 96])
def test_other_sizes_are_refused(dim: int) -> None:
    with pytest.raises(UserError, match=rf"^rotation=hadamard: {dim} channels .*power of two$"):
        hadamard(dim)
