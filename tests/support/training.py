"""Policies, batches and modules of small training runs, and what several tests compare of them."""

import functools
import itertools
import os
import signal
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generate import continuation
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy
from learnkv.scorers import LearnedScorer, SnapKV
from learnkv.training.data.batches import Batch, BatchSampler
from learnkv.training.data.sources import NextText, Spans
from learnkv.training.data.text_windows import Pool
from learnkv.training.losses import forward_kl
from learnkv.training.module import Distillation
from learnkv.training.settings import DistillationSettings
from support.commands import train
from support.forked import Fork

POOL = Pool(torch.randint(3, 100, (3000,), generator=torch.Generator().manual_seed(0)), [0])


def learned(scorer: bool = True) -> Policy:
    torch.manual_seed(0)
    heuristic = SnapKV(window=8)
    return Policy(
        LearnedScorer(heuristic, num_layers=2, num_heads=2, head_dim=8, width=4, window=8) if scorer else heuristic,
        LearnedAllocator(Uniform(), num_layers=2, num_heads=2),
        sinks=2,
        recent=4,
    )


def moved(number: int = 0) -> Policy:
    """A policy that is not the heuristic any more."""
    policy = learned()
    for parameter in policy.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return policy


def distillation(model: PreTrainedModel, policy: Policy, steps: int = 30, seed: int = 0, **keys: Any) -> Distillation:
    settings = DistillationSettings(**{"keep": (0.2,), "students": 1, **keys})
    module = Distillation(model, policy, settings, steps=steps, seed=seed)
    module.log = lambda *args, **keys: None
    return module


def batch(number: int = 0) -> Batch:
    spans = Spans(POOL, count=2, tokens=12, cue=4)
    return BatchSampler([(1.0, spans), (1.0, NextText(POOL, 12))], (50, 60), 2, 0.5, seed=1).batch(number)


def mean_kl(model: PreTrainedModel, one: Batch, held: Callable[[CompressedCache], CompressedCache]) -> float:
    """Divergence from the full cache of what `held` makes of one; every row is read by itself, without padding."""
    kl = []
    for row in range(2):
        mask = one.prompt_mask[row].bool()
        for ids, length, counted in zip(
            one.continuations.chunk(2)[row],
            one.continuation_mask.chunk(2)[row].sum(-1),
            one.counted.chunk(2)[row],
            strict=True,
        ):
            cache = prefill(model, one.prompts[row][mask][None])
            ids = ids[None, :length]
            full = continuation(model, ids, cache.fork())[0]
            part = continuation(model, ids, held(cache.fork()))[0]
            kl.append(forward_kl(full, part)[counted[:length]].mean())
    return torch.stack(kl).mean().item()


def gradients(module: Distillation, *batches: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean loss of some batches, and its gradients."""
    losses = [module.training_step(one, 0) for one in batches]
    loss = torch.stack(losses).mean()
    loss.backward()
    found = [one.grad.clone() for one in module.trained]
    for one in module.trained:
        one.grad = None
    return loss.detach(), found


def weights(path: Path) -> dict[str, torch.Tensor]:
    policy = load_policy(path)
    return {**policy.state_dict(), **(policy.adapter.state if policy.adapter is not None else {})}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **{"rtol": 0, "atol": 0, **tolerance})


def signalled(before: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The method, whose process gets a signal at this call."""
    calls = itertools.count(1)

    def method(self: Any, batch: Batch, batch_idx: int) -> Tensor | None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, batch, batch_idx)

    return method


def stored_tensors(checkpoint: Path) -> list[tuple[str, int]]:
    """Names and bytes of all tensors in a checkpoint; what else it holds names its strategy and folder."""
    with zipfile.ZipFile(checkpoint) as archive:
        return [(file.filename, file.file_size) for file in archive.infolist() if "/data/" in file.filename]


def in_two_processes(words: list[str], folder: Path) -> None:
    """Train as torchrun's processes do; test_preemption.py has those that Lightning starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def work(rank: int) -> int:
        rank_zero_only.rank = rank  # read when Lightning is imported
        return train([*words, "trainer.devices=2"])

    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    both = [Fork(functools.partial(work, rank), folder, **place, LOCAL_RANK=str(rank)) for rank in range(2)]
    for done in [process.wait() for process in both]:
        assert done.code == 0, done.err
