"""`model.generate(**inputs, custom_generate="owner/policy", trust_remote_code=True, keep=0.1)` of transformers.

An exported policy's folder has a file that calls this; everything but the compression is transformers' own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.errors import UserError
from learnkv.inference.attention import attach
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy
from learnkv.policy.byte_budget import ByteCount
from learnkv.policy.policy import Policy

_REPOSITORY = ("revision", "token", "proxies", "cache_dir", "force_download", "local_files_only", "code_revision")
"""Arguments about the repository that transformers passes on."""


def generate(
    model: PreTrainedModel,
    policy: Policy | str | Path,
    *,
    keep: float | None = None,
    budget: float | None = None,
    bytes: ByteCount | None = None,
    prompt_tokens: int | None = None,
    allow: Sequence[str] = (),
    inputs: Tensor | None = None,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **settings: Any,
) -> Any:
    """Read and compress a prompt, then generate with transformers' own `generate()`; returns what that returns.

    The model stays attached to learnkv, which changes nothing with other caches.

    Args:
        policy: a policy, or what `load_policy` takes.
        keep, budget, bytes: of the compression, one of them, as for `Policy.compress`.
        prompt_tokens: tokens from the beginning of every row, padding counted, that are compressed; what follows is
            read afterwards, as a question about a document. None: all but the last one.
        allow: module prefixes besides learnkv whose classes the policy may name.
        inputs, input_ids: [B, S] left-padded.
        attention_mask: [B, S]; None: no padding.
        past_key_values: must be None: a compressed cache is continued by `model.generate(past_key_values=cache)`.
        settings: arguments of transformers' `generate()`.

    Raises:
        UserError: for arguments that a compressed cache does not go with.
    """
    ids = input_ids if input_ids is not None else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        raise UserError("custom_generate: expected input_ids [batch, tokens] with at least 2 tokens")
    if past_key_values is not None:
        raise UserError("custom_generate: compresses a new prompt; continue a cache without custom_generate")
    end = ids.shape[1] - 1 if prompt_tokens is None else prompt_tokens
    if not 0 < end < ids.shape[1]:
        raise UserError(
            f"prompt_tokens={prompt_tokens}: expected 1 to {ids.shape[1] - 1}, one token less than there are"
        )
    for name in ("assistant_model", "negative_prompt_ids"):
        if settings.get(name) is not None:
            raise UserError(f"{name}: not supported with a compressed cache")
    loaded = policy if isinstance(policy, Policy) else _loaded(policy, model, allow)
    attach(model)
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    budgets = {"keep": keep, "budget": budget, "bytes": bytes}
    cache = prefill(model, ids[:, :end], mask[:, :end], policy=loaded, **budgets)  # type: ignore[arg-type]
    kept = {name: value for name, value in settings.items() if value is not None and name not in _REPOSITORY}
    if (rows := _rows_per_prompt(model, kept)) > 1:
        cache.batch_repeat_interleave(rows)
    # The class's own: a model's repository may have replaced that of the instance by such a function.
    return type(model).generate(model, input_ids=ids, attention_mask=mask, past_key_values=cache, **kept)


def _loaded(policy: str | Path, model: PreTrainedModel, allow: Sequence[str]) -> Policy:
    return load_policy(policy, allow, model).to(model.device)


def _rows_per_prompt(model: PreTrainedModel, settings: dict[str, Any]) -> int:
    """Beams, or returned sequences, into which transformers expands every row."""
    config = settings.get("generation_config") or model.generation_config
    wanted = (settings.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in wanted)
