"""Loading a language model with its tokenizer, and writing prompts the way the model expects them."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from learnkv.errors import UserError
from learnkv.inference import lora as adapters

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
_CUT = "\ue000\ue001"  # private use characters: no text has them


def load_model(
    model: str = "reference",
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen causal language model in evaluation mode and its tokenizer (left padding).

    Args:
        model: `reference` (the model in this package), a local folder, or a hub id. Local names never touch the
            network, and code that comes with a model is never run.
        revision: of a hub id: branch, tag or commit.
        dtype: float32, bfloat16, float16, or auto: as stored, but float32 on a CPU.
        device: cpu, cuda, cuda:N, mps, or auto: the first GPU if there is one.
        attn: transformers' attention implementation.

    Raises:
        UserError: one line for a missing folder, missing or corrupt files, missing weights, not a causal LM.
    """
    where = torch_device(device)
    folder = local_folder(model)
    source = str(folder) if folder else model
    options = {"revision": revision, "local_files_only": folder is not None, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        lm, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch_dtype(dtype, where),
            attn_implementation=attn,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"model={model}: {_reason(error, folder)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"model={model}: {len(missing)} weights are not in its files, first {missing[0]}")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return lm.to(where).eval().requires_grad_(False), tokenizer


def empty_model(model: str, revision: str | None = None, dtype: str = "bfloat16") -> PreTrainedModel:
    """The model as `load_model` gives it, but on the meta device: shapes without weights, of which none is read."""
    folder = local_folder(model)
    source = str(folder) if folder else model
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, local_files_only=folder is not None)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model={model}: {_reason(error, folder)}") from error
    return lm.eval().requires_grad_(False)


def local_folder(model: str) -> Path | None:
    """The folder that `model=` means, None for a hub id; UserError for a folder that is not there."""
    folder = REFERENCE if model == "reference" else Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or folder == REFERENCE or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        fault = f"{folder} has no config.json" if folder.exists() else f"{folder} does not exist"
        raise UserError(f"model={model}: expected `reference`, a model's folder or a hub id; {fault}")
    return None


def torch_device(device: str) -> torch.device:
    """The device that `device=` means."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device}: expected auto, cpu, cuda, cuda:N or mps") from None
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise UserError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def torch_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The number format that `dtype=` means on `device`, "auto" for the stored one."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected auto, {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _reason(error: Exception, folder: Path | None) -> str:
    """The first sentence of what transformers has to say, in our words where its own mislead."""
    text = str(error).strip()
    if "Unrecognized configuration class" in text:
        return f"expected a causal language model, got a {text.split('class ')[-1].split()[0].split('.')[-1][:-2]}"
    if isinstance(error, SafetensorError):
        return f"its weights are corrupt ({text})"
    first = text.split("\n")[0]
    return first if folder else f"no such folder, and loading it from the hub failed: {first}"


def config_hash(model: PreTrainedModel) -> str:
    """16 hex digits over the sizes that a policy depends on: equal for every dtype, path and transformers release."""
    config = model.config.get_text_config(decoder=True)
    shape = {key: getattr(config, key, None) for key in SHAPE_KEYS}
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """What a policy's manifest says of its model: id, config hash, and the sizes that a policy needs."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    sliding = kinds.count("sliding_attention") if len(set(kinds)) > 1 else 0  # those of a hybrid model stay as they are
    name = model.config._name_or_path
    return {
        "id": "reference" if name == str(REFERENCE) else name,
        "config_hash": config_hash(model),
        "shapes": {
            "layers": config.num_hidden_layers - sliding,
            "heads": heads,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "hidden_size": config.hidden_size,
            "groups": config.num_attention_heads // heads,
        },
    }


def model_digest(model: PreTrainedModel) -> str:
    """Of what a model computes, without reading all of its weights: description, number format, some of each matrix."""
    described = describe_model(model)
    # The config's hash covers the other sizes: a description that grows must not make earlier samples unknown.
    described["shapes"] = {key: described["shapes"][key] for key in ("layers", "heads", "head_dim")}
    about = json.dumps([described, str(model.dtype)], sort_keys=True)
    digest = hashlib.sha256(about.encode())
    for weight in (held for name, held in model.named_parameters() if not adapters.ours(name)):
        digest.update(weight.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def format_prompt(
    tokenizer: PreTrainedTokenizerBase, context: str, question: str, answer_prefix: str = ""
) -> tuple[str, str, str]:
    """The three parts of a prompt as text to be tokenised part by part, without adding special tokens.

    With a chat template, context and question are one user message, cut where the question begins: the template's head
    goes before the context, its tail after the question, and the answer prefix begins the model's reply. Without one,
    the context gets the BOS token that the tokenizer would give it.
    """
    if tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{context}{_CUT}{question}"}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
        )
        head, _, tail = chat.partition(_CUT)
        return head, tail, answer_prefix
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return f"{tokenizer.bos_token if begins else ''}{context}", question, answer_prefix
