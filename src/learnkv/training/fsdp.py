"""Several processes that share the weights of the frozen model and have the trained parameters each."""

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
    """FSDP2 of what is frozen, layer by layer, and DDP of what is trained.

    A layer's weights are gathered from all processes whenever one reads with it, so they have to read equally often:
    see `in_step`. Checkpoints hold what is trained, whole, as those of one process do.
    """

    def model_to_device(self) -> None:
        module = self.lightning_module
        assert module is not None
        shard(module.model, self.root_device.type, self.world_size)
        super().model_to_device()

    def _setup_model(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        return super()._setup_model(model)


def shard(model: Any, device: str, processes: int) -> None:
    """Cut the frozen parameters of a language model into one part per process, each decoder layer by itself."""
    mesh = init_device_mesh(device, (processes,))
    trained = {one for one in model.parameters() if one.requires_grad}
    for part in (*decoder_layers(model), model):
        fully_shard(part, mesh=mesh, ignored_params=trained)
    # A student that keeps everything has no gradient to pass on; its backward pass must gather weights all the same.
    model.enable_input_require_grads()


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Within the block processes that share a model may read unequally often: those that are through read along.

    Before every reading all are told that someone reads; at the end of the block, until no one does, a token is read
    for nothing.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    language_model: Any = model
    device = next(language_model.parameters()).device

    def anyone(reads: bool) -> bool:
        told = torch.tensor([float(reads)], device=device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told)

    def tell(*_: Any) -> None:
        anyone(True)

    hook = language_model.register_forward_pre_hook(tell, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        while anyone(False):
            language_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
