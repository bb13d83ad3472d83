"""Loading a language model with its tokenizer, and descriptions of a model."""

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from learnkv.cache.plain_layers import layout
from learnkv.errors import UserError
from learnkv.formats.hub_network import hub_fault
from learnkv.inference.attention_modules import attention_modules
from learnkv.inference.known_models import KNOWN_MODELS, fetched_folder, read_gguf

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "model"
DTYPES = ("float32", "bfloat16", "float16")
SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_CORRUPT = (SafetensorError, pickle.UnpicklingError, EOFError, IndexError)
_UNREADABLE = (*_CORRUPT, OSError, ValueError, RuntimeError, KeyError, ImportError)
"""What transformers raises for a model that it cannot load."""


def load_model(
    model: str = "reference",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal or vision-language model in evaluation mode and its tokenizer (left padding).

    Args:
        model: `reference` (the model in this package), `smollm2` once it was fetched, a local folder, a GGUF file,
            which is dequantised, or a hub id. Local names need no network, and code that comes with a model is never
            run.
        revision: of a hub id: branch, tag or commit.
        dtype: float32, bfloat16, float16, or auto: as stored; on a CPU float32, or bfloat16 where the model is stored
            so and the processor has instructions for it.
        device: cpu, cuda, cuda:N, mps, or auto: the first GPU if there is one.
        attn: transformers' attention implementation; sdpa is eager for models that have no sdpa.

    Raises:
        UserError: one line for a missing folder, missing or corrupt files, missing weights, not a causal LM.
    """
    target = torch_device(device)
    number_format = torch_dtype(dtype)
    gguf = _is_gguf(model)
    folder = Path(model).expanduser().parent if gguf else local_folder(model)
    source = str(folder) if folder else model
    fault = None if folder else hub_fault()
    local_only = folder is not None or fault is not None
    options = {"revision": revision, "local_files_only": local_only, "trust_remote_code": False}
    implementation = None if attn == "sdpa" else attn  # None: sdpa, or eager for models that have none
    try:
        config = None if gguf else AutoConfig.from_pretrained(source, **options)
        if dtype == "auto" and target.type == "cpu":
            number_format = cpu_dtype(config)
        if gguf:
            lm, tokenizer, report = read_gguf(Path(model).expanduser(), number_format, implementation)
            lm.config._name_or_path = model  # transformers' is the folder, which cannot be loaded
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            lm, report = _auto_class(config).from_pretrained(
                source, dtype=number_format, attn_implementation=implementation, output_loading_info=True, **options
            )
    except _UNREADABLE as error:
        raise UserError(f"model={model}: {_reason(error, folder, fault)}") from error
    if attn == "sdpa" and getattr(lm.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None:
        lm.set_attn_implementation("eager")  # sdpa of transformers 5.17 leaves the cap out
    _check_vocabulary(lm, tokenizer, model)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"model={model}: {len(missing)} weights are not in its files, first {missing[0]}")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return lm.to(target).eval().requires_grad_(False), tokenizer


def empty_model(model: str, revision: str | None = None, dtype: str = "bfloat16") -> PreTrainedModel:
    """The model of `load_model` on the meta device: shapes without weights."""
    folder = local_folder(model)
    source = str(folder) if folder else model
    fault = None if folder else hub_fault()
    try:
        local_only = folder is not None or fault is not None
        config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=local_only)
        with torch.device("meta"):
            lm = _auto_class(config).from_config(config, dtype=getattr(torch, dtype))  # with sdpa where it can
    except (OSError, ValueError, KeyError) as error:
        enough = "; a folder with the model's config.json is enough" if fault else ""
        raise UserError(f"model={model}: {_reason(error, folder, fault)}{enough}") from error
    return lm.eval().requires_grad_(False)


def _auto_class(config: Any) -> Any:
    """What builds a model of this config: a causal language model, or one that reads images, too."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _is_gguf(model: str) -> bool:
    return model.endswith(".gguf") and Path(model).expanduser().is_file()


def local_folder(model: str) -> Path | None:
    """The folder of `model=`, None for a hub id; UserError for a folder that does not exist."""
    folder = REFERENCE if model == "reference" else Path(model).expanduser()
    if model in KNOWN_MODELS and not folder.exists():
        if (fetched := fetched_folder(model)) is None:
            raise UserError(f"model={model}: not fetched yet: learnkv fetch {model}")
        return fetched
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or folder == REFERENCE or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        fault = f"{folder} has no config.json" if folder.exists() else f"{folder} does not exist"
        names = ", ".join(["`reference`", *KNOWN_MODELS])
        raise UserError(f"model={model}: expected {names}, a model's folder, a GGUF file or a hub id; {fault}")
    return None


def torch_device(device: str) -> torch.device:
    """The device of `device=`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device}: expected auto, cpu, cuda, cuda:N or mps") from None
    if parsed.type == "cuda" and not (parsed.index or 0) < torch.cuda.device_count():
        raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return parsed


def torch_dtype(dtype: str) -> torch.dtype | str:
    """The number format of `dtype=`, "auto" for the stored one."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected auto, {', '.join(DTYPES)}")
    parsed: torch.dtype | str = "auto" if dtype == "auto" else getattr(torch, dtype)
    return parsed


def cpu_dtype(config: Any) -> torch.dtype:
    """The number format of `dtype=auto` on a CPU, from the config of the stored model.

    bfloat16 is half of float32's time with the instructions for it, and several times as much without.
    """
    stored = getattr(config, "dtype", None)
    return torch.bfloat16 if stored == torch.bfloat16 and cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices (AVX-512 BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in names)


def _check_vocabulary(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raise UserError for a tokenizer with ids that the model does not embed, added tokens of no prompt excepted."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    template = str(tokenizer.chat_template or "")
    in_chats = (token for text, token in tokenizer.get_added_vocab().items() if text in template)
    largest = max([tokenizer.vocab_size - 1, *in_chats, *(token for token in special if token is not None)])
    size = embedded_tokens(lm)
    if largest >= size:
        raise UserError(f"model={model}: its tokenizer has ids up to {largest}, the model embeds {size} tokens")


def embedded_tokens(model: PreTrainedModel) -> int:
    """Token ids from 0 on that a model has embeddings for."""
    size: int = model.get_input_embeddings().num_embeddings
    return size


def _reason(error: Exception, folder: Path | None, fault: str | None = None) -> str:
    """The first sentence of an error of transformers, or a clearer one.

    Args:
        folder: the model's folder; None for a hub id.
        fault: why the hub could not be used.
    """
    text = str(error).strip() or type(error).__name__
    unpickling = isinstance(error, pickle.UnpicklingError | EOFError | IndexError)
    if unpickling or "weights_only" in text or "PytorchStreamReader" in text:
        return "its weights (pytorch_model.bin) are corrupt: expected tensors as torch.save writes them"
    if "Unrecognized configuration class" in text:
        return f"expected a causal language model, got a {text.split('class ')[-1].split()[0].split('.')[-1][:-2]}"
    if pointer := _lfs_pointer(folder):
        return f"{pointer} is a pointer of Git LFS, not the file: git lfs pull downloads it"
    if isinstance(error, _CORRUPT):
        return "its weights are corrupt" + (f" ({text})" if isinstance(error, SafetensorError) else "")
    first = text.split("\n")[0]
    if fault:
        return f"no such folder, none of the models that were downloaded before, and {fault}"
    return first if folder else f"no such folder, and loading it from the hub failed: {first}"


def _lfs_pointer(folder: Path | None) -> str | None:
    """Name of a file of weights that is a pointer of Git LFS."""
    files = [] if folder is None else [*folder.glob("*.bin"), *folder.glob("*.safetensors")]
    for file in files:
        with file.open("rb") as content:
            if content.read(40).startswith(b"version https://git-lfs"):
                return file.name
    return None


def context_length(model: PreTrainedModel) -> int | None:
    """The most tokens that a model can attend to; None where its config sets no limit.

    `linear`, `dynamic` and `yarn` stretch the length before scaling by their factor; of other kinds of RoPE
    `max_position_embeddings` is the length after scaling.
    """
    config = model.config.get_text_config(decoder=True)
    context: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if context is None or rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return context
    before = rope.get("original_max_position_embeddings") or context
    return max(context, int(before * (rope.get("factor") or 1.0)))


def _size(config: Any, key: str) -> Any:
    """A size in a config; None where there is none, or where it differs between layers."""
    try:
        return getattr(config, key, None)
    except Exception:  # transformers has a class of its own for sizes that differ between layers
        return None


def config_hash(model: PreTrainedModel) -> str:
    """16 hex digits over the sizes that a policy depends on: equal for every dtype, path and transformers release."""
    config = model.config.get_text_config(decoder=True)
    shape = {key: _size(config, key) for key in SHAPE_KEYS}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def attention_layers(model: str, expected_hash: str) -> list[str]:
    """Module names of the attention layers of `model=` that a policy compresses, such as `model.layers.0.self_attn`.

    Only its config is read.

    Raises:
        UserError: for a model that cannot be found, or of other sizes than those of `expected_hash`.
    """
    lm = empty_model(model)
    if config_hash(lm) != expected_hash:
        raise UserError(f"model={model}: the policy was trained for a model of other sizes")
    return [name for name, _ in attention_modules(lm, layout(lm.config).compressible)]


def _known_name(path: str) -> str:
    """The name that `model=` takes for the folder of a shipped or fetched model; other paths in full, hub ids."""
    if path == str(REFERENCE):
        return "reference"
    fetched = (name for name in KNOWN_MODELS if Path(path).name == name and path == str(fetched_folder(name)))
    return next(fetched, str(Path(path).resolve()) if path and Path(path).exists() else path)


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """The model as a policy's manifest has it: id, config hash, and the sizes that a policy needs."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    name = model.config._name_or_path
    return {
        "id": _known_name(name),
        "config_hash": config_hash(model),
        "shapes": {
            "layers": len(layout(model.config).compressible),  # of a hybrid model, those that are compressed
            "heads": heads,
            "head_dim": _size(config, "head_dim") or config.hidden_size // config.num_attention_heads,
            "hidden_size": config.hidden_size,
            "groups": config.num_attention_heads // heads,
        },
    }
