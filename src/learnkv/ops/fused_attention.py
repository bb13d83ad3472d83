"""torch's fused attention on a CPU, with the log-sum-exp that its public function keeps to itself."""

import torch
from torch import Tensor

_FUSED = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)


def is_available(query: Tensor) -> bool:
    """Whether attention of such queries is fused: on a CPU, without gradients."""
    return _FUSED is not None and query.is_cpu and not torch.is_grad_enabled()


def fused_attention(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, D] of queries [B, H, N, D] to rows [B, H, S, D], S > 0, and its log-sum-exp [B, H, N]."""
    assert _FUSED is not None
    output, lse = _FUSED(query, keys, values, scale=scaling)
    return output, lse
