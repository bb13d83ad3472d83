"""Digests of everything about a model and its tokenizer that can change a number."""

import hashlib
import json
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learnkv.errors import UserError
from learnkv.inference import lora
from learnkv.inference.attention import implementation

_MANTISSA = 11
"""Low bits of a float32 that are dropped from computed buffers: machines differ in the last one."""
_OTHERS = {"training", "gradient_checkpointing", "max_seq_len_cached", "name_or_path", "compute_type_is_set"}
"""Attributes of modules that change no number, or that a call leaves behind."""


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model: weights, config, generation config, number format, attention, versions of the libraries.

    Neither its folder nor what learnkv adds to it (`attach`, adapters of policies) changes the digest.
    """
    generation = getattr(model, "generation_config", None)
    about = {
        "weights": weights_digest(model),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": _values(model.config.to_dict()),
        "generation": None if generation is None else _values(generation.to_dict()),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": implementation(model),
        "matmul": torch.get_float32_matmul_precision(),
        "versions": [torch.__version__, version("transformers")],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the content of all parameters and buffers, adapters of policies excepted; about 1 GB/s per core.

    Tensors are read each time: a file's name, time and size do not show what was changed in memory.

    Raises:
        UserError: offloaded weights.
    """
    tensors = dict(sorted((name.replace(".base_layer.", "."), tensor) for name, tensor in _tensors(model)))
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UserError(f"weight {name} is offloaded: load the model whole, samples are identified by its weights")
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(tensor_digest, tensors.values()))
    return hashlib.sha256(json.dumps([*zip(tensors, digests, strict=True), _settings(model)]).encode()).hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer: vocabulary, rules, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(rules, dict):  # state of the last call
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    about = [type(tokenizer).__qualname__, rules, tokenizer.special_tokens_map, tokenizer.chat_template, cleans]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of type, shape and content."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(model: nn.Module, as_is: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name; computed buffers rounded unless `as_is`."""
    packed = {path: module for path, module in model.named_modules() if _packs_weights(module)}
    for name, weight in model.named_parameters():
        if not lora.is_adapter_weight(name) and name.rpartition(".")[0] not in packed:
            yield from plain_tensors(name, weight)
    for path, module in packed.items():
        _apply_once(module, getattr(model, "dtype", torch.float32))
        for name, part in module.state_dict().items():
            if isinstance(part, Tensor):
                yield f"{path}.{name}", part.bfloat16().flatten() if part.is_floating_point() else part
    for path, module in model.named_modules():
        if path in packed:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            computed = name in module._non_persistent_buffers_set
            if not (computed and _follows_length(module, name)):
                rounded = computed and buffer.is_floating_point() and not as_is
                yield f"{path}.{name}", _rounded(buffer) if rounded else buffer


def _packs_weights(module: nn.Module) -> bool:
    """Whether a quantised layer has scales that are no parameters or buffers, and writes them when it is saved."""
    saves: Any = type(module)._save_to_state_dict
    return saves is not nn.Module._save_to_state_dict and not any(module.children())


@torch.no_grad()
def _apply_once(layer: Any, dtype: torch.dtype) -> None:
    """Let a quantised layer rearrange its weights, as some of bitsandbytes do in their first pass on a CPU."""
    if hasattr(layer, "in_features"):
        layer(torch.zeros(1, layer.in_features, dtype=dtype, device=layer.weight.device))


def plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a weight is made of: a quantised one has codes and scales."""
    if not is_traceable_wrapper_subclass(tensor) or isinstance(tensor, DTensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _follows_length(module: nn.Module, name: str) -> bool:
    """Whether transformers replaces this buffer while it reads long inputs; the original lies beside it."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    changes = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
    return changes and name.endswith("inv_freq") and "original" not in name


def _rounded(buffer: Tensor) -> Tensor:
    """The first 12 bits of each mantissa."""
    bits = buffer.detach().float().cpu().contiguous().view(torch.int32)
    return (bits + (1 << _MANTISSA - 1)) >> _MANTISSA


def _settings(model: nn.Module) -> list[tuple[str, Any]]:
    """What modules compute with besides their tensors: their classes, numbers and words, and adapters in use."""
    settings: list[tuple[str, Any]] = []
    adapted: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{layer}.") and not f"{path}.".startswith(f"{layer}.base_layer.") for layer in adapted):
            continue  # parts of an adapter, which are digested with their layer
        about: Any
        if lora.is_adapted(module):
            adapted.append(path)
            about = lora.own_settings(module)
        else:
            about = [type(module).__qualname__, *sorted(filter(_is_setting, vars(module).items()))]
        if about:
            settings.append((path.replace(".base_layer", ""), about))
    return settings


def _is_setting(item: tuple[str, Any]) -> bool:
    """Whether an attribute of a module changes what it computes."""
    name, value = item
    return not name.startswith("_") and name not in _OTHERS and isinstance(value, bool | int | float | str)


def _values(config: Any) -> Any:
    """A config without private keys (its folder among them), the library's version, and what `attach` replaces."""
    if isinstance(config, dict):
        left_out = ("transformers_version", "attn_implementation")
        return {
            str(key): _values(value)
            for key, value in config.items()
            if not str(key).startswith("_") and key not in left_out
        }
    return [_values(value) for value in config] if isinstance(config, list | tuple) else config


_known: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()
_SAMPLED = 16
"""Numbers of each tensor that are compared before a digest is used again."""


def known_weights_digest(model: nn.Module) -> str:
    """`weights_digest`, computed again only where a tensor was replaced or written to since the last call.

    Writes are noticed by torch's version counters, and those through `.data`, which do not count, by a sample of every
    tensor's numbers.
    """
    identity = (_settings(model), [(name, *_identity(tensor)) for name, tensor in _tensors(model, as_is=True)])
    if (known := _known.get(model)) is not None and known[0] == identity:
        return known[1]
    digest = weights_digest(model)
    _known[model] = (identity, digest)
    return digest


def _identity(tensor: Tensor) -> tuple[object, ...]:
    if tensor.is_meta:
        return ()
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(len(flat) // _SAMPLED, 1)].tolist()
    return (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tuple(tensor.shape), sample)
