"""KL, perplexity and accuracy of a continuation, against the formulas on transformers' own output."""

import pytest
import torch
from support.models import Loaded
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.evaluation.tasks.text import Text
from learnkv.inference import given_tokens
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy


def prompts_of(loaded: Loaded, rows: int = 3) -> list[Prompt]:
    tokens = torch.randint(2, len(loaded[1]), (rows, 48), generator=torch.Generator().manual_seed(1)).tolist()
    return [Prompt("text", 48, "query_agnostic", i, ids[:31], ids[31:]) for i, ids in enumerate(tokens)]


def read(model: PreTrainedModel, prompts: list[Prompt]) -> CompressedCache:
    return prefill(model, *pad([prompt.prefill_ids for prompt in prompts], "left", model.device))


def test_the_full_cache_gives_the_plain_models_loss(loaded: Loaded) -> None:
    model, prompts = loaded[0], prompts_of(loaded)
    records, _ = Text(prompts).measure(model, prompts, read(model, prompts))
    ids = torch.tensor([prompt.prefill_ids + prompt.suffix_ids for prompt in prompts])
    logits, labels = model(ids).logits[:, 31:-1], ids[:, 32:]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(-1)
    assert [one["loss"] for one in records] == pytest.approx(loss.tolist(), rel=1e-5)
    right = 100 * (logits.argmax(-1) == labels).float().mean(-1)
    assert [one["score"] for one in records] == pytest.approx(right.tolist())
    assert [one["kl"] for one in records] == [0, 0, 0]


def test_kl_is_from_the_full_to_the_compressed_distribution(
    loaded: Loaded,
) -> None:
    model, prompts = loaded[0], prompts_of(loaded)
    family, cache = Text(prompts), read(model, prompts)
    _, full = family.measure(model, prompts, cache.fork())
    records, some = family.measure(model, prompts, load_policy("snapkv").compress(cache.fork(), keep=0.3), full)
    p, q = full.double().softmax(-1), some.double().softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1).mean(-1)
    assert [one["kl"] for one in records] == pytest.approx(by_hand.tolist(), rel=1e-4)
    assert by_hand.min() > 1e-3
    same, _ = family.measure(model, prompts, load_policy("snapkv").compress(cache.fork(), keep=1.0), full)
    assert max(one["kl"] for one in same) < 1e-8


def test_nan_stops_the_run(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = loaded[0], prompts_of(loaded, 1)
    monkeypatch.setattr(given_tokens, "continuation", lambda *a: torch.full((1, 17, 8), float("nan")))
    with pytest.raises(RunError, match="NaN"):
        Text(prompts).measure(model, prompts, read(model, prompts))
