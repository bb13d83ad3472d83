"""Values of all tokens with the gradient of a sample."""

import torch

from learnkv.ops.sampled_gradient import sampled_gradient


def test_values_are_those_given_and_the_gradient_is_the_samples() -> None:
    values, slots = torch.randn(2, 3, 10, 4), torch.tensor([1, 4, 9])
    sampled = torch.randn(2, 3, 3, 4, requires_grad=True)
    weight = torch.randn(2, 3, 10, 4)
    result = sampled_gradient(values, sampled, slots)
    assert torch.equal(result, values)
    (grad,) = torch.autograd.grad((result * weight).sum(), sampled)
    assert torch.equal(grad, weight[:, :, slots] * (10 / 3))


def test_a_sample_of_all_tokens_has_the_gradient_itself() -> None:
    values, slots = torch.randn(1, 1, 5, 2, dtype=torch.float64), torch.arange(5)
    sampled = values.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(sampled_gradient(values, sampled, slots).square().sum(), sampled)
    torch.testing.assert_close(grad, 2 * values)
