"""One process of FSDP2: what is shared out, what is not, and that losses and gradients stay what they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import batch, distillation, gradients, moved
from torch import Tensor
from torch.distributed.tensor import DTensor

from learnkv.errors import UserError
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy
from learnkv.scorers import CriticalKV, SnapKV
from learnkv.training.fsdp import in_step, shard


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_shared_out_and_the_policy_is_not(folder: Path, one_process: None, checkpointing: bool) -> None:
    keys = {
        "keep": (0.2, 1.0),
        "students": 2,
        "keep_sampling": "sandwich",
        "checkpointing": checkpointing,
        "chunk_size": 20,
    }
    loss, grads = gradients(distillation(load_model(str(folder))[0], moved(), **keys), batch(1))
    model = load_model(str(folder))[0]
    shard(model, "cpu", 1)
    module = distillation(model, moved(), **keys)
    other, others = gradients(module, batch(1))
    assert torch.equal(other, loss)
    for one, two in zip(grads, others, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)
    for layer in model.model.layers:
        layer.reshard()
    assert all(isinstance(one, DTensor) for one in model.model.layers.parameters())
    assert not any(isinstance(one, DTensor) for one in module.policy.parameters())


def test_a_process_that_is_through_reads_along(
    folder: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(folder))[0]
    shard(model, "cpu", 1)
    told, others = [], iter([1.0, 1.0, 0.0])

    def others_read_twice_more(flag: Tensor, op: Any) -> None:
        told.append(flag.item())
        flag.fill_(max(flag.item(), next(others) if not flag.item() else 0.0))

    monkeypatch.setattr(torch.distributed, "all_reduce", others_read_twice_more)
    seen = []
    model.register_forward_pre_hook(lambda _, args, keys: seen.append(keys["input_ids"].shape[1]), with_kwargs=True)
    with in_step(model):
        prefill(model, torch.randint(3, 100, (1, 50)), chunk_size=30)
    assert seen == [30, 20, 1, 1]
    assert told == [1, 1, 0, 0, 0]


def test_a_weight_that_was_gathered_is_not_read_when_a_plan_is_made(folder: Path, one_process: None) -> None:
    model, policy = load_model(str(folder))[0], Policy(CriticalKV(SnapKV(window=8)))
    policy.compress(prefill(model, torch.randint(3, 100, (1, 50)), policies=[policy]), keep=0.5)
    shard(model, "cpu", 1)
    cache = prefill(model, torch.randint(3, 100, (1, 50)), policies=[policy])
    with pytest.raises(UserError, match="fsdp"):
        policy.compress(cache, keep=0.5)
