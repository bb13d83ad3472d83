"""ModelOpt's KV-cache part of `hf_quant_config.json`: one format of keys and values per attention layer."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnkv.errors import UserError
from learnkv.formats.files import read_json, write_text

BITS: Mapping[str, float] = {"NVFP4": 4.5, "FP8_K_NVFP4_V": 6.25, "FP8": 8.0}
"""Bits per number of every format; NVFP4 has a scale of 8 bits for 16 numbers."""
SCHEMA = 1
_STEPS = tuple(BITS)


def share_bits(importance: Sequence[float], bits: float) -> list[str]:
    """A format for each layer [L], with at most `bits` per number on average.

    All layers begin with NVFP4. Keys become FP8 in the order of importance, since keys need more bits than values, then
    values in the same order; equal layers in their own order.

    Raises:
        UserError: for fewer bits than NVFP4 has, or more than FP8.
    """
    least, most = BITS["NVFP4"], BITS["FP8"]
    if not least <= bits <= most:
        raise UserError(f"bits={bits:g}: expected {least:g} (NVFP4) to {most:g} (FP8)")
    layers = len(importance)
    steps = math.floor((bits - least) * layers / ((most - least) / 2) + 1e-9)
    order = sorted(range(layers), key=lambda layer: -importance[layer])
    taken = [0] * layers
    for layer in [*order, *order][:steps]:
        taken[layer] += 1
    return [_STEPS[count] for count in taken]


def mean_bits(formats: Sequence[str]) -> float:
    """Bits per number, the mean over layers of equal sizes."""
    return sum(BITS[name] for name in formats) / len(formats)


def write(path: str | Path, layers: Sequence[str], formats: Sequence[str], producer: str) -> Path:
    """Write the format of every attention layer.

    Args:
        layers: names of the model's attention modules, such as `model.layers.0.self_attn`.
        formats: of `BITS`, one for each.
        producer: version of this package.
    """
    names = set(formats)
    quantization = {
        "kv_cache_quant_algo": names.pop() if len(names) == 1 else "MIXED_PRECISION",
        "kv_cache_quantized_layers": {layer: {"quant_algo": name} for layer, name in zip(layers, formats, strict=True)},
        "kv_cache_schema_version": SCHEMA,
    }
    content = {"producer": {"name": "learnkv", "version": producer}, "quantization": quantization}
    return write_text(path, json.dumps(content, indent=2) + "\n")


def read(path: str | Path) -> dict[str, str]:
    """Format by name of the attention layer, in the order of the file.

    Raises:
        UserError: no such file, another format or version.
    """
    content = read_json(path)
    part: Any = content.get("quantization") if isinstance(content, dict) else None
    layers = part.get("kv_cache_quantized_layers") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(layers, dict) or not layers:
        raise UserError(f"{path}: expected quantization.kv_cache_quantized_layers of ModelOpt")
    if part.get("kv_cache_schema_version") != SCHEMA:
        raise UserError(f"{path}: kv_cache_schema_version {part.get('kv_cache_schema_version')}, expected {SCHEMA}")
    formats = {name: value.get("quant_algo") if isinstance(value, dict) else None for name, value in layers.items()}
    unknown = [name for name, kind in formats.items() if kind not in BITS]
    if unknown:
        raise UserError(f"{path}: {unknown[0]} has {formats[unknown[0]]}, expected one of {', '.join(BITS)}")
    return {name: str(kind) for name, kind in formats.items()}
