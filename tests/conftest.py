"""What holds for every test: nothing reaches for a network, GPU tests need a GPU, kernels run without one."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest.register_assert_rewrite("support.originals")  # their asserts tell the numbers, as those of test files do

try:
    from hypothesis import settings
except ImportError:
    """A machine that only measures may lack it; the tests in tests/gpu do without."""
else:  # the same examples in every run: a change is judged by what it changes
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported for the first time, by whichever test that is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)  # first, or the last of several processes ends long after others
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
