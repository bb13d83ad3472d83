"""Norms of values after the output projection."""

import pytest
import torch

from learnkv.ops.output_norms import output_norms


@pytest.mark.parametrize("order", [1, 2])
def test_norms_are_those_of_the_projected_values_of_every_query_head(order):
    values, weight = torch.randn(2, 3, 5, 4), torch.randn(7, 3 * 2 * 4)
    norms = output_norms(values, weight, order)
    assert norms.shape == (2, 3, 2, 5)
    for h in range(3):
        for g in range(2):
            through = weight.view(7, 3, 2, 4)[:, h, g]
            expected = torch.linalg.vector_norm(values[:, h].double() @ through.T.double(), order, -1)
            torch.testing.assert_close(norms[:, h, g].double(), expected, rtol=1e-5, atol=1e-6)
