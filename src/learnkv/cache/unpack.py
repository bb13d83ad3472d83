"""A compressed cache from the plain containers and tensors that `pack` made of another one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.page_index import PageIndex
from learnkv.cache.states import Kept, Prompt
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.cache.tiers import StoredTier
from learnkv.core.codec import Encoded
from learnkv.core.images import ImageTokens
from learnkv.core.observation import CaptureSpec
from learnkv.core.precision import Level
from learnkv.core.protection import Protection
from learnkv.ops.softmax_terms import SoftmaxTerms


class UnpackedTensors:
    """Parts of packed tensors. On a CPU they are views of the packed ones, which may be a mapped file."""

    def __init__(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int]]) -> None:
        self._parts = {group: tensors[group].split(list(of_group)) for group, of_group in sizes.items()}
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    def get(self, place: str, device: torch.device) -> Tensor:
        """A part on a device, always the same tensor."""
        if (place, device) not in self._moved:
            group, _, index = place.rpartition("/")
            self._moved[place, device] = self._parts[group][int(index)].to(device)
        return self._moved[place, device]

    def optional(self, place: str | None, device: torch.device) -> Tensor | None:
        """The same; None for None."""
        return None if place is None else self.get(place, device)


def unpack(
    config: PretrainedConfig,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    components: Sequence[Any],
    devices: Sequence[torch.device],
) -> CompressedCache:
    """The cache that was packed.

    Args:
        config: of the model.
        description, tensors: results of `pack`.
        components: the codecs and page selectors of the description, built anew.
        devices: of every layer of the model.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError: for a description that `pack` did not make.
    """
    cache, parts = CompressedCache(config), UnpackedTensors(tensors, description["sizes"])
    cache.prompt_lengths, cache.covered = list(description["prompt_lengths"]), list(description["covered"])
    cache.narrow, cache.tail_padded = bool(description["narrow"]), bool(description["tail_padded"])
    if (spans := description["protection"]) is not None:
        cache.protection = _protection(*spans)
    main = devices[0]
    cache.tail_mask = parts.get(description["is_token"], main).bool()
    pending = [parts.get(place, main) for place in description["pending"]]
    cache.pending = (pending[0], pending[1]) if pending else None
    ids = [parts.get(place, main).long() for place in description["token_ids"]]
    cache.token_ids = (ids[0], ids[1]) if ids else None
    cache.budgets = parts.optional(description["budgets"], main)
    for index, described in zip(cache.compressible, description["layers"], strict=True):
        _fill(cache.layers[index], described, parts, components, devices[index], cache.no_entries)
    if (images := description.get("images")) is not None:
        shifts, in_space = tuple(map(int, images["shifts"])), bool(images["in_space"])
        cache.images = ImageTokens(parts.get(images["is_image"], main), shifts, in_space)
        for compressed in cache.compressed_layers():
            compressed.capture.images = cache.images
    for index, described in description["sliding"].items():
        layer: Any = cache.layers[int(index)]
        keys, values = (parts.get(place, devices[int(index)]) for place in described["entries"])
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.cumulative_length = keys, values, int(described["length"])
    device_of = {id(layer): device for layer, device in zip(cache.layers, devices, strict=True)}
    for state_layer, stored in zip(cache.state_layers(), description.get("states", ()), strict=True):
        device = device_of[id(state_layer)]
        state_layer.restore_states({name: parts.get(place, device) for name, place in stored.items()})
    return cache


def _protection(spans: Any, after_anchors: Any, share: float) -> Protection:
    """From lists."""
    always, after = (
        tuple(tuple((int(begin), int(end)) for begin, end in row) for row in part) for part in (spans, after_anchors)
    )
    return Protection(always, after, float(share))


def _fill(
    layer: CompressedLayer,
    described: Mapping[str, Any],
    parts: UnpackedTensors,
    components: Sequence[Any],
    device: torch.device,
    no_entries: dict[torch.device, Tensor],
) -> None:
    """Set the state of a new layer."""
    heads, *dims = described["sizes"]
    dtype = getattr(torch, described["dtype"])
    layer.lazy_initialization(*(torch.empty(1, heads, 1, dim, dtype=dtype, device=device) for dim in dims))
    layer.prompt_slots, layer.merged_tokens = described["slots"]
    if "prompt" in described:
        state = _complete(layer, described, parts, device)
    else:
        tiers = tuple(_tier(layer, tier, parts, components, device) for tier in described["tiers"])
        state = Kept(_segment(described, parts, device, dtype, no_entries, tiers), tiers=tiers)
    if pages := described.get("pages"):
        index = PageIndex(components[pages["selector"]], pages["tokens"], state.segment)
        state = Kept(state.segment, state.prompt, index, state.tiers)
    layer.state = state
    if "tail" in described:
        keys, values = (parts.get(place, device) for place in described["tail"])
        layer.tail = DecodeBuffer(keys, values, keys.shape[2])


def _complete(
    layer: CompressedLayer, described: Mapping[str, Any], parts: UnpackedTensors, device: torch.device
) -> Kept:
    """A complete prompt, from which policies of the last queries can be compressed."""
    keys, values = (parts.get(place, device) for place in described["prompt"])
    capture = layer.capture
    capture.queries = parts.optional(described["queries"], device)
    capture.query_positions = parts.optional(described["query_positions"], device)
    capture.capture_spec = CaptureSpec(0 if capture.queries is None else capture.queries.shape[2])
    capture.scaling = float(described["scaling"])
    cap = described.get("softcap")
    capture.terms = SoftmaxTerms(None if cap is None else float(cap), parts.optional(described.get("sinks"), device))
    return Prompt(keys, values, parts.optional(described["valid"], device)).seal()


def _segment(
    described: Mapping[str, Any],
    parts: UnpackedTensors,
    device: torch.device,
    dtype: torch.dtype,
    no_entries: dict[torch.device, Tensor],
    tiers: Sequence[StoredTier],
) -> Segment:
    stored = described["segment"]
    if stored is None:
        rows = len(tiers[0].entries.offset)
        zeros = no_entries.setdefault(device, torch.zeros(rows, dtype=torch.int64, device=device))
        return Segment.empty(torch.empty(1, 1, 0, described["sizes"][1], dtype=dtype, device=device), zeros)
    keys, values = parts.get(stored["keys"], device), parts.get(stored["values"], device)
    segment = _rows(keys, values, stored, parts, device)
    if not len(keys) == len(values) == len(segment.positions):
        raise ValueError("keys, values and positions do not have equally many entries")
    return segment


def _rows(
    keys: Tensor, values: Tensor, stored: Mapping[str, Any], parts: UnpackedTensors, device: torch.device
) -> Segment:
    """Ragged rows with their tables, which may not reach beyond the entries."""
    positions, tables = parts.get(stored["positions"], device), parts.get(stored["tables"], device)
    offset, length = tables.unbind()
    longest, count = int(stored["longest"]), len(positions)
    if bool(((offset < 0) | (length < 0) | (offset + length > count) | (length > longest)).any()):
        raise ValueError("tables reach beyond the entries")
    return Segment(keys, values, positions, offset, length, longest, {}, parts.optional(stored["rotated"], device))


def _tier(
    layer: CompressedLayer,
    stored: Mapping[str, Any],
    parts: UnpackedTensors,
    components: Sequence[Any],
    device: torch.device,
) -> StoredTier:
    level, dims = Level(*(components[number] for number in stored["level"])), stored["head_dims"]
    keys, values = (
        Encoded(
            {name: parts.get(place, device) for name, place in stored[part].items()},
            tuple(map(int, stored["entries"])),
            int(dim),
            layer.layer_idx,
        )
        for part, dim in zip(("keys", "values"), dims, strict=True)
    )
    nothing = torch.empty(0, int(dims[0]), dtype=layer.dtype, device=device)
    rows = _rows(nothing, nothing, stored, parts, device)
    stored_bytes = [sum(tensor.nbytes for tensor in part.tensors.values()) for part in (keys, values)]
    expected = [codec.nbytes(keys.entries, int(dim)) for codec, dim in zip(level, dims, strict=True)]
    if sum(keys.entries) != len(rows.positions) or stored_bytes != expected:
        raise ValueError("codes and positions do not have equally many entries")
    return StoredTier(level, keys, values, rows, layer.heads)
