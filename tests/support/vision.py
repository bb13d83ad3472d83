"""Tiny vision-language models with random weights, and prompts with an image."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from learnkv import attach
from support.configs import COMMON, HYBRID, WINDOW, sizes
from support.models import tokens

IMAGE = 96
TEXT: dict[str, Any] = {**COMMON, **sizes(32, 2, 4, 2, 8)}
TOWER = {"hidden_size": 16, "intermediate_size": 32}
MARKERS = {"image_token_id": IMAGE, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
GRID = {
    **TOWER,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
SIGLIP = {**TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": SECTIONS},
        "vision_config": GRID | {"window_size": 16, "fullatt_block_indexes": [0]},
        "tie_word_embeddings": False,
        **MARKERS,
    },
    "qwen3_vl": {  # adds what its tower sees to hidden states of several layers
        "text_config": TEXT | {"rope_parameters": SECTIONS | {"mrope_interleaved": True}},
        "vision_config": GRID | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "in_channels": 3},
        "tie_word_embeddings": False,
        **MARKERS,
    },
    "gemma3": {  # attends within an image in both directions
        "text_config": TEXT
        | {"num_hidden_layers": 4, "layer_types": HYBRID, "sliding_window": WINDOW, "query_pre_attn_scalar": 8},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 94,
        "eoi_token_index": 93,
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": SIGLIP | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    },
}
FAMILIES = list(CONFIGS)
IN_SPACE = ("qwen2_5_vl", "qwen3_vl")
"""Families whose images have positions in space."""


def build(family: str) -> Any:
    """A new model with the same weights every time."""
    config = AutoConfig.for_model(family, **CONFIGS[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
        for name, weight in model.named_parameters():
            if "mm_input_projection" in name:  # which transformers begins at 0
                nn.init.normal_(weight, 0, 0.25)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


plain = functools.cache(build)


@functools.cache
def attached(family: str) -> Any:
    return attach(build(family))


def prompt(family: str, length: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids [1, S] with one image, and the other arguments that a processor gives for them."""
    ids = tokens(1, length, seed) % 90 + 1
    generator = torch.Generator().manual_seed(seed)
    if family in IN_SPACE:
        height, width = (4, 6) if seed % 2 else (4, 12)
        ids[0, 5 : 5 + height * width // 4] = IMAGE
        pixels = torch.randn(height * width, 3 * 16, generator=generator)
        inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
        return ids, inputs | {"mm_token_type_ids": (ids == IMAGE).int()}
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    ids[0, 5 : 5 + (4 if family == "gemma3" else 16)] = IMAGE
    inputs = {"pixel_values": pixels}
    return ids, inputs | ({"token_type_ids": (ids == IMAGE).long()} if family == "gemma3" else {})


def continued(inputs: dict[str, Tensor], new: int) -> dict[str, Tensor]:
    """The other arguments of the prompt with `new` more tokens of text."""
    return {
        name: torch.cat([part, part.new_zeros(1, new)], 1) if name.endswith("type_ids") else part
        for name, part in inputs.items()
    }


def together(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two prompts as a left-padded batch: ids, mask and other arguments."""
    longest = max(one[0].shape[1], other[0].shape[1])

    def left(part: Tensor) -> Tensor:
        return torch.cat([part.new_zeros(1, longest - part.shape[1]), part], 1)

    mask = torch.cat([left(torch.ones_like(ids)) for ids, _ in (one, other)])
    inputs = {
        name: torch.cat([left(given[name]) if name.endswith("type_ids") else given[name] for _, given in (one, other)])
        for name in one[1]
    }
    return torch.cat([left(ids) for ids, _ in (one, other)]), mask, inputs
