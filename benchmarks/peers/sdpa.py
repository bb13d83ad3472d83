"""Attention to a full cache as well as PyTorch can do it: buffers allocated once, grouped queries, no copy, no mask."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
"""Implementations that read grouped keys once; the faster one is the ideal."""

NAME = "benchmark_full_cache"


def attend(query: Tensor, keys: Tensor, values: Tensor, backend: SDPBackend) -> Tensor:
    """Attention [B, H*G, 1, D] of one new token to keys and values [B, H, T, D]."""
    if query.device.type == "cpu":
        backend = SDPBackend.MATH
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


class FullLayer(CacheLayerMixin):
    """Keys and values [B, H, T, D] of which the newest token overwrites the last, so that a step can be replayed."""

    is_sliding = False
    is_compileable = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("made with its buffers")

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self, *_: object) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length


def full_cache(shape: tuple[int, int, int, int], layers: int, like: Tensor) -> Cache:
    """Random keys and values [B, H, T, D] for every layer, on the device and of the type of `like`."""

    def numbers() -> Tensor:
        return torch.randn(shape, device=like.device, dtype=like.dtype)

    return Cache(layers=[FullLayer(numbers(), numbers()) for _ in range(layers)])


def use(model: PreTrainedModel, backend: SDPBackend) -> None:
    """Let the model attend with `backend` and no mask."""

    def attention(module, query, key, value, attention_mask, scaling=None, **_: object):  # type: ignore[no-untyped-def]
        assert attention_mask is None
        assert scaling is not None
        assert abs(scaling - query.shape[-1] ** -0.5) < 1e-6
        return attend(query, key, value, backend).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)
