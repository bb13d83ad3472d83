"""What a generation follows: arguments of the call, the model's generation config, transformers' defaults."""

import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from learnkv.errors import UserError

_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1),
    "num_return_sequences": (None, 1),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "is_assistant": (None, False),
    "use_mtp": (None, False),
    "token_healing": (None, False),
    "cache_implementation": (None, "dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
}
"""Settings that change tokens in ways that are not followed -> values that change nothing.

The other implementations of a cache hold the same numbers; a CompressedCache takes their place.
"""

_SEARCH = (
    "max_new_tokens",
    "num_beams",
    "do_sample",
    "length_penalty",
    "early_stopping",
    "eos_token_id",
    "pad_token_id",
)


def generation_config(model: PreTrainedModel, arguments: Mapping[str, Any]) -> GenerationConfig:
    """The settings of one generation: `arguments`, else the model's generation config, else transformers' defaults.

    Args:
        arguments: by their names in a GenerationConfig. Without `do_sample` the choice is greedy.

    Raises:
        UserError: for a name or value that transformers does not know, and for settings that are not supported.
    """
    counts = arguments["max_new_tokens"], arguments.get("num_beams", 1)
    if not all(isinstance(count, Integral) and int(count) >= 1 for count in counts):
        raise UserError(f"max_new_tokens={counts[0]} num_beams={counts[1]}: expected at least 1 of each, whole numbers")
    if arguments.get("do_sample") is None and model.generation_config.do_sample:
        warnings.warn(
            "the model's generation config samples, learnkv.generate is greedy unless do_sample=True", stacklevel=4
        )
    given = {**arguments, "do_sample": bool(arguments.get("do_sample"))}
    try:
        config, unused = model._prepare_generation_config(None, **given)
    except (ValueError, TypeError) as error:
        raise UserError(f"generation config: {' '.join(str(error).split())}") from None
    unknown = sorted((unused.keys() & given.keys()) - {"output_attentions", "output_hidden_states"})
    if unknown:
        raise UserError(f"{unknown[0]}: not an argument of learnkv.generate, nor of transformers' GenerationConfig")
    for name, neutral in _UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise UserError(
                f"{name}={value!r} of the call or of the model's generation config is not supported by "
                f"learnkv.generate: set it to {neutral[0]}"
            )
    _check_ranges(config, arguments)
    return config


def _check_ranges(config: GenerationConfig, arguments: Mapping[str, Any]) -> None:
    """Raise UserError for values of the sampling settings out of range, where they are used or were given."""
    names = ("temperature", "top_p", "top_k")
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    values = {name: getattr(config, name) for name in names if config.do_sample or arguments.get(name) is not None}
    values = {**neutral, **{name: value for name, value in values.items() if value is not None}}
    temperature, top_p, top_k = (values[name] for name in names)
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UserError(
            f"temperature={temperature:g} top_p={top_p:g} top_k={top_k}: expected temperature > 0, 0 < top_p <= 1, "
            "top_k >= 0 (0: all tokens)"
        )


def special_tokens(config: GenerationConfig) -> tuple[tuple[int, ...], int]:
    """Ids that end a row, and the padding id."""
    eos, pad = config.eos_token_id, config.pad_token_id
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return ends, pad if pad is not None else (ends[0] if ends else 0)


def search_only(config: GenerationConfig) -> dict[str, Any]:
    """Arguments of transformers' own generate() that keep the search's settings and switch all others off."""
    off = {name: None for name in config.to_dict() if not name.startswith("_") and name != "transformers_version"}
    search = {name: getattr(config, name) for name in _SEARCH}
    return {**off, **config._get_default_generation_params(), "top_k": None, "max_length": None, **search}
