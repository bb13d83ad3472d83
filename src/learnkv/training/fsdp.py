"""FSDP2 for the frozen model and DDP for the trained parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from learnkv.training.activation_checkpointing import decoder_layers


class Sharded(DDPStrategy):
    """Shards the frozen model layer by layer (FSDP2) and replicates the trained parameters (DDP).

    A layer's weights are gathered from all processes in every forward pass, so all processes must run equally many: see
    `in_step`. Checkpoints contain the trained parameters unsharded, as those of one process do.
    """

    def model_to_device(self) -> None:
        module = self.lightning_module
        assert module is not None
        shard(module.model, self.root_device.type, self.world_size)
        super().model_to_device()

    def _setup_model(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        return super()._setup_model(model)


def shard(model: Any, device: str, processes: int) -> None:
    """Shard the frozen parameters of a language model over processes, one FSDP group per decoder layer."""
    mesh = init_device_mesh(device, (processes,))
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for part in (*decoder_layers(model), model):
        fully_shard(part, mesh=mesh, ignored_params=trained)
    # A student that keeps everything has no gradient, but its backward pass must gather weights, too.
    model.enable_input_require_grads()


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Lets processes with a sharded model run different numbers of forward passes within the block.

    Before every forward pass, and at the end of the block, an all-reduce finds out whether any process still runs one;
    processes that are done join it with a dummy token.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    language_model: Any = model
    device = next(language_model.parameters()).device

    def any_process(running: bool) -> bool:
        flag = torch.tensor([float(running)], dtype=torch.float32, device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def announce(*_: Any) -> None:
        any_process(True)

    hook = language_model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        while any_process(False):
            language_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
