"""Kept entries and the tail, merged into a prompt that a policy can score again."""

import torch
from torch import Tensor

from learnkv.cache.layer import CompressedLayer
from learnkv.cache.states import Kept, Prompt, Relaxed
from learnkv.cache.tiers import Carried
from learnkv.ops.tail_slots import padding_first


def merge_tail(layer: CompressedLayer, longest: int, positions: Tensor) -> None:
    """Make kept entries and tail a prompt again, as if the layer had just read them; the tail is empty then.

    In training the tail's keys and values take part without their gradients.

    Entries of a head lie at the end of its slots, in position order and without gaps: scorers pool neighbouring slots.

    Args:
        longest: the most entries that a head keeps.
        positions: [B, M] position of each slot of the tail, negative for padding.
    """
    segment, tail, state = layer.segment, layer.tail, layer.state
    assert segment is not None
    assert tail is not None
    assert isinstance(state, Kept | Relaxed)
    shape = (layer.batch, layer.heads, longest)
    pools, tier = (segment.keys, segment.values), None
    if state.tiers:  # entries in fewer bits, which are all of them
        (tier,) = state.tiers
        segment, pools = tier.entries, tier.decoded(segment.keys.dtype)
    index, valid = segment.padded(longest)
    of_kept = segment.positions[index].masked_fill(~valid, -1).view(shape).long()
    positions_of_all = torch.cat([of_kept, positions.unsqueeze(1).expand(-1, layer.heads, -1)], 2)
    keys = torch.cat([pools[0][index].view(*shape, -1), tail.keys.detach()], 2)
    values = torch.cat([pools[1][index].view(*shape, -1), tail.values.detach()], 2)
    capture = layer.capture
    capture.statistics = {name: pool[index].view(*shape, -1) for name, pool in segment.statistics.items()}
    capture.resume(positions, layer.layer_idx, keys, values, positions_of_all)
    order = padding_first(positions_of_all >= 0)
    capture.statistics = {name: _moved(statistic, order) for name, statistic in capture.statistics.items()}
    rotated = None
    if segment.rotated is not None:
        of_kept = segment.rotated[index].view(shape).long()
        rotated = torch.cat([of_kept, positions_of_all[..., longest:]], 2).gather(2, order)
    carried = None
    if tier is not None:
        new = index.new_full((*shape[:2], tail.length), -1)
        places = torch.cat([index.masked_fill(~valid, -1).view(shape), new], 2)
        carried = Carried(tier, places.gather(2, order))
    entries = (_moved(keys, order), _moved(values, order), None, positions_of_all.gather(2, order))
    layer.state = Prompt(*entries, rotated, state.page_index, carried, state.evicted)
    layer.merged_tokens += tail.length
    tail.crop(0)


def _moved(tensor: Tensor, order: Tensor) -> Tensor:
    """Entries [B, H, S, D] in another order [B, H, S]."""
    return tensor.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, tensor.shape[-1]))
