"""How much a model's last hidden states depend on what its attention layers add, for tokens of an extra pass."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.state_layer import StateLayer
from learnkv.core.observation import PassTokens
from learnkv.errors import UserError
from learnkv.inference.attention_modules import attention_modules


def gradient_norms(model: PreTrainedModel, cache: CompressedCache, tokens: PassTokens, mask: Tensor) -> Tensor:
    """Norms [L, B, R] of d Phi / d (output of a layer's attention), 0 for padding.

    Phi is the sum, over the tokens of the pass, of |h|^2 with h the last layer's output before the final norm. The
    prompt's keys and values are constants. One forward and one backward pass over the R tokens.

    Args:
        cache: complete prompts.
        tokens: of the pass.
        mask: [B, S] of the prompts.

    Raises:
        UserError: for a model without a list of decoder layers.
    """
    blocks = getattr(model.get_decoder(), "layers", None)
    if blocks is None or len(blocks) != len(cache.layers):
        raise UserError(f"{type(model).__name__}: expected a decoder with a list of layers, whose gradients are read")
    outputs: dict[int, Tensor] = {}
    last: list[Tensor] = []
    hooks = [blocks[-1].register_forward_hook(lambda module, args, output: last.append(_first(output)))]
    for _, module in attention_modules(model, cache.compressible):
        hooks.append(module.register_forward_hook(_record(outputs)))
    with torch.inference_mode(False), torch.enable_grad():
        past = _constants(cache)
        shift = 0 if cache.images is None else torch.tensor(cache.images.shifts).unsqueeze(-1).to(tokens.ids.device)
        both = torch.cat([mask, tokens.mask], 1).clone()
        try:
            model(
                inputs_embeds=model.get_input_embeddings()(tokens.ids.clone()).detach().requires_grad_(),
                attention_mask=None if bool(both.all()) else both,
                position_ids=(both.cumsum(-1) - 1).clamp_min(0)[:, mask.shape[1] :] + shift,
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            for hook in hooks:
                hook.remove()
        objective = (last[0].float().square().sum(-1) * tokens.mask.clone().to(last[0].device)).sum()
        gradients = torch.autograd.grad(objective, [outputs[layer_idx] for layer_idx in cache.compressible])
    norms = torch.stack([gradient.float().norm(dim=-1).to(tokens.ids.device) for gradient in gradients])
    return norms.masked_fill(~tokens.mask, 0.0)


def _constants(cache: CompressedCache) -> DynamicCache:
    """The cache of complete prompts as transformers' own, with copies of its keys and values."""
    past, compressed = DynamicCache(), iter(cache.compressed_layers())
    past.layers = []
    for layer_idx, source in enumerate(cache.layers):
        if layer_idx in cache.compressible:
            obs, layer = next(compressed).observation(), _plain(source)
            layer.update(obs.keys.detach().clone(), obs.values.detach().clone())
        elif isinstance(source, StateLayer):
            layer = source.fork()
        else:
            layer = copy.copy(source)
            layer.keys, layer.values = (part.detach().clone() for part in (source.keys, source.values))
        past.layers.append(layer)
    return past


class _WithState(StateLayer, DynamicLayer):
    """Keys and values of transformers' own layer beside a state."""

    is_compileable = False

    def __init__(self, number_of_states: int) -> None:
        DynamicLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        DynamicLayer.lazy_initialization(self, *args, **kwargs)


def _plain(source: Any) -> DynamicLayer:
    """A layer without entries, with copies of a source's states."""
    if not isinstance(source, StateLayer):
        return DynamicLayer()
    layer = _WithState(source.number_of_states)
    layer.take_states(source)
    return layer


def _record(outputs: dict[int, Tensor]) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        outputs[module.layer_idx] = _first(output)

    return hook


def _first(output: Any) -> Tensor:
    """The hidden states of a module that may return more."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
