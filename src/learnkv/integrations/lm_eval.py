"""Compressed caches in lm-evaluation-harness, as its model `learnkv`: `pip install learnkv[lm-eval]`."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.errors import RunError, UserError
from learnkv.inference.models import load_model
from learnkv.integrations.compressed_model import CompressedModel, Request
from learnkv.persistence.named_configs import nearest
from learnkv.persistence.policies import load_policy
from learnkv.policy.byte_budget import ByteCount

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise UserError(f"learnkv.integrations.lm_eval: expected lm-eval, pip install learnkv[lm-eval] ({error})") from None

OF_HFLM = ("add_bos_token", "chat_template_args", "max_length", "prefix_token_id", "softmax_dtype", "truncation")
"""Arguments of lm-eval's own model that mean here what they mean there."""


@register_model("learnkv")
class CompressedLM(HFLM):
    """lm-eval's model for transformers, with a cache that is compressed between a context and what follows it.

    Likelihoods: every token of the context but the last is read and compressed, once for all continuations of one
    context; then the last token and the continuation are read from what is left. Rolling likelihoods: the first half of
    each window is compressed, and the second half is read from what is left; the first half is scored as it is read,
    so that every token is scored once. Generation: as for likelihoods, then the answer is generated. Texts are
    tokenised, split and cut from the left as HFLM does it.

    Args:
        pretrained, revision, dtype, device, attn: as of `load_model`.
        policy: as of `load_policy`.
        keep, budget, bytes: exactly one of them, as of `Policy.compress`.
        precision: bits of what is kept; None: the policy's.
        whole_below: contexts of fewer tokens are not compressed; 0: one that is too short for the budget is an error.
        allow: module prefixes besides learnkv whose classes the policy's file may name, with + between them.
        batch_size: contexts that are read at once, and then continuations.
        max_batch_size: of lm-eval's search for a batch size, which there is not.
        hflm: further arguments of HFLM, of those in `OF_HFLM`.

    Raises:
        UserError: other arguments, several processes, or a budget that a context is too short for.
    """

    def __init__(
        self,
        pretrained: str = "reference",
        policy: str = "reference",
        keep: float | None = None,
        budget: float | None = None,
        bytes: ByteCount | None = None,
        precision: int | None = None,
        whole_below: int = 0,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attn: str = "sdpa",
        allow: str = "",
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        **hflm: Any,
    ) -> None:
        _refuse(batch_size, hflm)
        model, tokenizer = load_model(str(pretrained), revision, dtype, device, attn)
        loaded = load_policy(policy, [part for part in allow.split("+") if part], model)
        if precision is not None:
            loaded = loaded.with_precision(precision)
        budgets = {"keep": keep, "budget": budget, "bytes": bytes}
        self.compressor = CompressedModel(model, loaded.to(model.device), budgets, whole_below)
        self.policy_name = policy
        self._rolling = False
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=int(batch_size), **hflm)
        self.revision = revision

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._rolling = True
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm))
        finally:
            self._rolling = False

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation, and whether it is the greedy one.

        Args:
            requests: texts, or None of rolling windows; tokens of the context; tokens of the continuation.
        """
        split = [self._request(context, continuation) for _, context, continuation in requests]
        answers = [(0.0, False)] * len(split)
        for number, logits in self.compressor.logits(split, self.batch_size):
            answers[number] = self._answer(logits, split[number].ids[-split[number].count :])
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _request(self, context: list[int], continuation: list[int]) -> Request:
        """The last tokens that the model can read, and where they are compressed."""
        if len(continuation) > self.max_length:
            raise UserError(f"a continuation of {len(continuation)} tokens: the model's context is {self.max_length}")
        ids = (context + continuation)[-(self.max_length + 1) :]
        cut = (len(ids) - 1) // 2 if self._rolling else len(ids) - 1 - len(continuation)
        return Request(ids, len(continuation), cut)

    def _answer(self, logits: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
        """Sum of the log-probabilities of T tokens by their logits [T, V], and whether each is ranked first."""
        if bool(logits.isnan().any()):
            raise RunError("the model's output is NaN")
        wanted = torch.tensor(tokens, device=logits.device)
        log_probs = logits.log_softmax(-1, dtype=self.softmax_dtype)
        likelihood = log_probs.gather(-1, wanted.unsqueeze(-1)).sum()
        return float(likelihood), bool((log_probs.argmax(-1) == wanted).all())

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Texts [B, S] with what is generated after them."""
        mask = settings.pop("attention_mask")
        given = {**settings, "pad_token_id": self.tokenizer.pad_token_id}
        if not given.get("temperature"):  # lm-eval's word for greedy
            given.pop("temperature", None)
            given["do_sample"] = False
        new = max_length - context.shape[1]

        def whole(ids: Tensor, of_ids: Tensor) -> Tensor:
            slots = ids.shape[1]
            own = dict(settings)  # HFLM changes it
            texts: Tensor = HFLM._model_generate(self, ids, slots + new, stop, attention_mask=of_ids, **own)
            return texts[:, slots:]

        ended = _ended(self.tokenizer, stop)
        generated = self.compressor.generated(context, mask.bool(), new, ended, given, whole)
        return torch.cat([context, generated], 1)

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's, without a look at the hub, and what was compressed: over all contexts of the run."""
        usage, compressor = self.compressor.usage, self.compressor
        spent = sum(usage.spent) / len(usage.spent) if usage.spent else None
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "policy": self.policy_name,
            **{name: value for name, value in compressor.budget.items() if value is not None},
            **({} if compressor.policy.precision is None else {"precision": compressor.policy.precision_name}),
            "spent": spent,
            "contexts": usage.contexts,
            "contexts_whole": usage.contexts_whole,
            "bytes": usage.nbytes,
            "bytes_full": usage.full_nbytes,
        }


def _refuse(batch_size: int | str, hflm: dict[str, Any]) -> None:
    """UserError for what cannot be done."""
    for name, value in hflm.items():
        if name not in OF_HFLM:
            raise UserError(f"model_args {name}={value}: not supported{nearest(name, list(OF_HFLM))}")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise UserError(f"batch_size={batch_size}: expected a number of contexts, at least 1")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE={processes}: expected one process")


def _ended(tokenizer: Any, stop: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """Which rows of new tokens [B, N] have any of the strings in their text."""
    terms = [term for term in stop if term]

    def ended(tokens: Tensor) -> Tensor:
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return torch.tensor([any(term in text for term in terms) for text in texts])

    return ended
