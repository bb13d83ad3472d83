"""What is retained and the tail, made a prompt again that a policy can judge."""

import torch
from torch import Tensor

from learnkv.cache.layer import CompressedLayer


def merge_tail(layer: CompressedLayer, longest: int, said: Tensor) -> None:
    """Put a layer back into the state in which it had just read what it holds; the tail is empty then.

    A student's tail takes part as what was read, without the gradient of its keys and values.

    Entries of a head stand at the end of its slots, in position order and without gaps: what is next to an entry is
    what scorers pool it with.

    Args:
        longest: the most entries that a head retains.
        said: [B, M] position of each slot of the tail, negative where it is padding.
    """
    held, tail, shape = layer.segment, layer.tail, (layer.batch, layer.heads, longest)
    assert held is not None
    assert tail is not None
    at, there = held.padded(longest)
    retained = held.positions[at].masked_fill(~there, -1).view(shape).long()
    positions = torch.cat([retained, said.unsqueeze(1).expand(-1, layer.heads, -1)], 2)
    keys = torch.cat([held.keys[at].view(*shape, -1), tail.keys.detach()], 2)
    values = torch.cat([held.values[at].view(*shape, -1), tail.values.detach()], 2)
    rotated = positions
    if held.rotated is not None:
        rotated = torch.cat([held.rotated[at].view(shape).long(), positions[..., longest:]], 2)
    layer.capture.statistics = {one: pool[at].view(*shape, -1) for one, pool in held.statistics.items()}
    layer.capture.resume(said, layer.at, keys, values, positions)
    order = (positions >= 0).to(torch.int8).argsort(dim=-1, stable=True)
    layer.keys, layer.values, layer.positions = _moved(keys, order), _moved(values, order), positions.gather(2, order)
    layer.capture.statistics = {one: _moved(stat, order) for one, stat in layer.capture.statistics.items()}
    layer.rotated = None if held.rotated is None else rotated.gather(2, order)
    layer.segment = layer.gates = layer.valid = None
    layer.copies = 1
    layer.merged_tokens += tail.length
    tail.crop(0)


def _moved(held: Tensor, order: Tensor) -> Tensor:
    """Entries [B, H, S, D] in another order [B, H, S]."""
    return held.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, held.shape[-1]))
