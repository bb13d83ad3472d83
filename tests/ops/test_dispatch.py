"""Which implementation runs, and what is refused."""

from unittest import mock

import pytest
import torch

from learnkv.errors import UserError
from learnkv.ops.dispatch import Impl, implementation, using

BOTH = ("reference", "triton")


def name(impl: Impl, available: tuple[str, ...] = BOTH, **options: bool) -> str:
    return implementation("select", impl, available, torch.ones(1, **options)).__name__.rsplit(".", 1)[1]


def test_on_the_cpu_auto_is_the_reference() -> None:
    assert name("auto") == "reference"


def test_auto_means_something_else_within_a_block() -> None:
    with using("triton"):
        assert name("auto") == "triton"
        assert name("reference") == "reference"
        assert name("auto", ("reference",)) == "reference"
        with using("reference"):
            assert name("auto") == "reference"
        assert name("auto") == "triton"
    assert name("auto") == "reference"


def test_a_choice_ends_with_its_block_also_when_it_fails() -> None:
    with pytest.raises(RuntimeError, match="inside"), using("triton"):
        raise RuntimeError("inside")
    assert name("auto") == "reference"


def test_an_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="impl='triton': select has reference"):
        name("triton", ("reference",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="needs a CUDA device"):
        name("triton")


def test_kernels_refuse_what_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="computes no gradients"):
        name("triton", requires_grad=True)
    assert name("auto", requires_grad=True) == "reference"
    with torch.no_grad():
        assert name("triton", requires_grad=True) == "triton"


def test_what_a_kernel_lacks_is_refused_or_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    on_a_gpu = mock.Mock(requires_grad=False, is_cuda=True)
    assert implementation("select", "auto", BOTH, on_a_gpu).__name__.endswith("triton")
    assert implementation("select", "auto", BOTH, on_a_gpu, lacks="odd rows").__name__.endswith("reference")
    refused = r"^impl='triton': select has no kernel for odd rows, expected impl='reference'$"
    with pytest.raises(UserError, match=refused):
        implementation("select", "triton", BOTH, on_a_gpu, lacks="odd rows")
    with using("triton"), pytest.raises(UserError, match=refused):
        implementation("select", "auto", BOTH, on_a_gpu, lacks="odd rows")
