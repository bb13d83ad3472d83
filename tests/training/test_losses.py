"""KL, weights and means of distillation, against sums written out."""

import pytest
import torch

from learnkv.training.losses import context_weights, forward_kl, sample_means


def test_forward_kl_is_the_sum_over_the_vocabulary_and_trains_the_student_only() -> None:
    teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    kl = forward_kl(teacher, student)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(kl.double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6)
    kl.sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, (q - p).detach(), rtol=1e-4, atol=1e-6)
    assert forward_kl(teacher, teacher).abs().max() < 1e-6


def test_means_do_not_mix_samples() -> None:
    values, sample = torch.tensor([1.0, 3.0, 10.0, 20.0, 60.0]), torch.tensor([0, 0, 2, 2, 2])
    assert sample_means(values, sample, 3).tolist() == pytest.approx([2.0, 0.0, 30.0])
    weighted = sample_means(values, sample, 3, torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0]))
    assert weighted.tolist() == pytest.approx([2.5, 0.0, 20.0])


def test_context_weights_follow_what_is_lost_within_a_sample() -> None:
    lost, sample = torch.tensor([0.0, 2.0, 1.0, 100.0, 100.0]), torch.tensor([0, 0, 0, 1, 1])
    assert context_weights(lost, sample, 2).tolist() == pytest.approx([0.05, 2.0, 1.0, 1.0, 1.0])
    many = torch.cat([torch.zeros(99), torch.ones(1)])
    assert context_weights(many, torch.zeros(100, dtype=torch.long), 1)[-1].item() == pytest.approx(20.0)
