"""A compressed cache as plain containers and few tensors, to be written to disk; `unpack` is the inverse."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.entry_index import EntryIndex
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.states import Kept, Prompt
from learnkv.cache.storage import Segment
from learnkv.cache.tiers import StoredTier
from learnkv.core.component import Component
from learnkv.core.images import ImageTokens
from learnkv.errors import UserError


class PackedTensors:
    """Tensors of many layers, those of one kind after each other in one tensor: a file of few names."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._groups: dict[tuple[str, torch.dtype, tuple[int, ...]], str] = {}

    def add(self, name: str, tensor: Tensor | None) -> str | None:
        """Where the tensor [N, …] will be, as `unpack` takes it; None stays None."""
        if tensor is None:
            return None
        key = (name, tensor.dtype, tuple(tensor.shape[1:]))
        group = self._groups.setdefault(key, f"{name}{len(self._groups)}")
        self._parts.setdefault(group, []).append(tensor.detach())
        return f"{group}/{len(self._parts[group]) - 1}"

    def sizes(self) -> dict[str, list[int]]:
        """Length of the first dimension of every part of every tensor."""
        return {group: [len(part) for part in parts] for group, parts in self._parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU, each with a storage of its own."""
        return {group: torch.cat([part.cpu() for part in parts]) for group, parts in self._parts.items()}


class Classes:
    """Components by the number under which a description has them."""

    def __init__(self) -> None:
        self.components: list[Component] = []

    def number(self, component: Component) -> int:
        """Number of the component; the same object has the same number."""
        for index, known in enumerate(self.components):
            if known is component:
                return index
        self.components.append(component)
        return len(self.components) - 1


def pack(cache: CompressedCache) -> tuple[dict[str, Any], dict[str, Tensor], list[Component]]:
    """A description in plain containers, the tensors, and the codecs and page selectors that the description numbers.

    What scorers other than those of the last queries read of a complete prompt is left out; a policy that needs it is
    refused when it plans.

    Raises:
        UserError: for what is not stored: online eviction, a cache in training, a prompt that was not read to its end.
    """
    _refuse_unstored(cache)
    packed, classes = PackedTensors(), Classes()
    layers = cache.compressed_layers()
    pools: dict[tuple[int, ...], dict[str, str | None]] = {}
    description = {
        "prompt_lengths": cache.prompt_lengths,
        "covered": cache.covered,
        "narrow": cache.narrow,
        "tail_padded": cache.tail_padded,
        "protection": cache.protection,
        "is_token": packed.add("is_token", cache.is_token()),
        "pending": [packed.add("pending", part) for part in cache.pending or ()],
        "token_ids": [packed.add("ids", part.to(torch.int32)) for part in cache.token_ids or ()],
        "budgets": packed.add("budgets", cache.budgets),
        "layers": [_layer(layer, packed, classes, pools) for layer in layers],
        "sliding": {str(index): _sliding(cache.layers[index], packed) for index in cache.sliding},
        "images": None if cache.images is None else _images(cache.images, packed),
        "states": [
            {name: packed.add(f"states.{name}", part) for name, part in layer.states().items()}
            for layer in cache.state_layers()
        ],
    }
    description["sizes"] = packed.sizes()
    return description, packed.tensors(), classes.components


def _refuse_unstored(cache: CompressedCache) -> None:
    if cache.schedule is not None:
        raise UserError(
            f"evict_interval={cache.schedule.evict_interval}: online eviction is not stored; compress a fork by a "
            "policy with evict_interval=0"
        )
    for layer in cache.compressed_layers():
        if layer.relaxed:
            raise UserError("a cache in training is not stored: expected one that compress or prefill returned")
        if not isinstance(layer.state, Kept):
            raise UserError("the prompt has not been read to its end: a cache that is being filled is not stored")
        if layer.state.evicted is not None:
            raise UserError(f"residual={layer.state.evicted.store.name}: not stored; expected a policy without")
        if isinstance(layer.page_index, EntryIndex):
            raise UserError(f"pages={layer.page_index.selector.name}: what it remembers of a cache is not stored")


def _layer(
    layer: CompressedLayer,
    packed: PackedTensors,
    classes: Classes,
    pools: dict[tuple[int, ...], dict[str, str | None]],
) -> dict[str, Any]:
    state = layer.state
    assert isinstance(state, Kept)
    heads, keys, values = layer.sizes
    described: dict[str, Any] = {
        "sizes": [heads, keys, values],
        "slots": [layer.prompt_slots, layer.merged_tokens],
        "dtype": str(layer.dtype).removeprefix("torch."),
    }
    if layer.tail is not None:
        described["tail"] = [packed.add("tail", part) for part in (layer.tail.keys, layer.tail.values)]
    if state.page_index is not None:
        selector, tokens = state.page_index.selector, state.page_index.tokens.tolist()
        described["pages"] = {"selector": classes.number(selector), "tokens": tokens}
    if state.prompt is not None:
        return described | _complete(state.prompt, layer, packed)
    described["tiers"] = [_tier(tier, packed, classes) for tier in state.tiers]
    described["segment"] = _segment(state.segment, packed, pools)
    return described


def _complete(prompt: Prompt, layer: CompressedLayer, packed: PackedTensors) -> dict[str, Any]:
    """A complete prompt, with the last queries."""
    capture = layer.capture
    return {
        "prompt": [packed.add("prompt", prompt.keys), packed.add("prompt", prompt.values)],
        "valid": packed.add("valid", prompt.valid),
        "queries": packed.add("queries", capture.queries),
        "query_positions": packed.add("query_positions", capture.query_positions),
        "scaling": capture.scaling,
        "softcap": capture.terms.softcap,
        "sinks": packed.add("sinks", capture.terms.sinks),
    }


def _segment(
    segment: Segment, packed: PackedTensors, pools: dict[tuple[int, ...], dict[str, str | None]]
) -> dict[str, Any] | None:
    """Tables of one layer's rows and where its pool is, which layers may share; None: a layer without entries."""
    if segment.length is segment.offset:
        return None
    parts = {"keys": segment.keys, "values": segment.values, "positions": segment.positions, "rotated": segment.rotated}
    identity = tuple(0 if part is None else part.data_ptr() for part in parts.values())
    if identity not in pools or not len(segment.keys):
        pools[identity] = {name: packed.add(name, part) for name, part in parts.items()}
    tables = packed.add("table", torch.stack([segment.offset, segment.length]))
    return {**pools[identity], "tables": tables, "longest": segment.longest}


def _tier(tier: StoredTier, packed: PackedTensors, classes: Classes) -> dict[str, Any]:
    rows = tier.entries
    return {
        "level": [classes.number(codec) for codec in tier.level],
        "keys": {name: packed.add(f"keys.{name}", part) for name, part in tier.keys.tensors.items()},
        "values": {name: packed.add(f"values.{name}", part) for name, part in tier.values.tensors.items()},
        "entries": list(tier.keys.entries),
        "head_dims": [tier.keys.head_dim, tier.values.head_dim],
        "positions": packed.add("positions", rows.positions),
        "rotated": packed.add("rotated", rows.rotated),
        "tables": packed.add("table", torch.stack([rows.offset, rows.length])),
        "longest": rows.longest,
    }


def _images(images: ImageTokens, packed: PackedTensors) -> dict[str, Any]:
    """Which slots are images, and positions."""
    is_image = packed.add("is_image", images.is_image)
    return {"is_image": is_image, "shifts": list(images.shifts), "in_space": images.in_space}


def _sliding(layer: CacheLayerMixin, packed: PackedTensors) -> dict[str, Any]:
    """A layer of transformers' own that attends to a sliding window."""
    keys, values = layer.keys, layer.values
    assert isinstance(keys, Tensor)
    return {
        "entries": [packed.add("sliding", keys), packed.add("sliding", values)],
        "length": layer.get_seq_length(),
    }
