"""Answers that are read: ranks and KL against transformers' own output, apart from generated answers."""

from pathlib import Path

import pytest
import torch
from support.models import Loaded

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cli.main import main
from learnkv.data.ruler import Ruler
from learnkv.data.sample import Sample
from learnkv.errors import RunError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks import Forced, load
from learnkv.evaluation.tasks.answers import sample_of
from learnkv.evaluation.tasks.base import pad
from learnkv.inference import given_tokens
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

TASKS = ("niah_single_1", "niah_multivalue", "vt")


def family_of(loaded: Loaded) -> Forced:
    (family,) = load(EvalConfig(tasks=TASKS, lengths=(480,), samples=1, score="forced"), loaded[1], 512)
    assert isinstance(family, Forced)
    return family


def cache_of(loaded: Loaded, family: Forced, *policies: Policy) -> CompressedCache:
    ids, mask = pad([prompt.prefill_ids for prompt in family.prompts], "left", loaded[0].device)
    return prefill(loaded[0], ids, mask, policies=policies)


def plain_logits(loaded: Loaded, family: Forced) -> list[torch.Tensor]:
    """Predictions of each answer's tokens [T, V] by the model without us."""
    found = []
    for prompt in family.prompts:
        answer = family.answer_ids(prompt)
        ids = torch.tensor([prompt.prefill_ids + prompt.suffix_ids + answer])
        found.append(loaded[0](ids).logits[0, -len(answer) - 1 : -1])
    return found


def test_the_full_cache_ranks_as_the_plain_model_does(loaded: Loaded) -> None:
    family = family_of(loaded)
    records, predictions = family.measure(loaded[0], family.prompts, cache_of(loaded, family))
    for record, prediction, plain in zip(records, predictions, plain_logits(loaded, family), strict=True):
        torch.testing.assert_close(prediction, plain, rtol=1e-4, atol=1e-4)
        assert record["kl"] == 0
        assert record["score"] == 0  # a random model
        assert record["tokens"] == len(plain)


def test_an_answer_that_the_model_ranks_first_scores_100(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(loaded)
    ids = {}
    for prompt in family.prompts:
        read = [*prompt.prefill_ids, *prompt.suffix_ids]
        with torch.no_grad():
            for _ in range(4):
                read.append(int(loaded[0](torch.tensor([read])).logits[0, -1].argmax()))
        ids[prompt.task] = read[-4:]
    monkeypatch.setattr(family, "answer_ids", lambda prompt: ids[prompt.task])
    records, _ = family.measure(loaded[0], family.prompts, cache_of(loaded, family))
    assert [record["score"] for record in records] == [100, 100, 100]
    ids["vt"] = [*ids["vt"][:3], (ids["vt"][3] + 1) % 500]
    records, _ = family.measure(loaded[0], family.prompts, cache_of(loaded, family))
    assert [record["score"] for record in records] == [100, 100, 0]


def test_kl_is_that_of_the_answers_tokens(loaded: Loaded) -> None:
    family, model = family_of(loaded), loaded[0]
    cache = cache_of(loaded, family)
    _, full = family.measure(model, family.prompts, cache.fork())
    records, some = family.measure(model, family.prompts, load_policy("snapkv").compress(cache.fork(), keep=0.2), full)
    for record, with_all, with_some in zip(records, full, some, strict=True):
        p, q = with_all.double().softmax(-1), with_some.double().softmax(-1)
        assert record["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
        assert record["kl"] > 1e-3


@pytest.mark.parametrize("name", ["quest", "tova", "h2o_decode"])
def test_pages_and_online_eviction_read_answers_as_generation_does(
    name: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, sizes = family_of(loaded), []
    original = given_tokens.continuation

    def spy(model: torch.nn.Module, ids: torch.Tensor, *more: object) -> torch.Tensor:
        sizes.append(ids.shape[1])
        return original(model, ids, *more)

    monkeypatch.setattr(given_tokens, "continuation", spy)
    policy = load_policy(name)
    cache = policy.compress(cache_of(loaded, family, policy), keep=0.5)
    family.measure(loaded[0], family.prompts, cache)
    question = min(len(prompt.suffix_ids) for prompt in family.prompts)
    one_by_one = cache.read != cache.spent or cache.schedule is not None
    assert one_by_one == (name != "tova")
    assert (sizes[0] == question and set(sizes[1:]) == {1}) if one_by_one else len(sizes) == 1


def test_answers_are_worded_as_the_prompt_asks(loaded: Loaded) -> None:
    ruler = Ruler(loaded[1], 512)
    chain, values = ruler.sample("vt", 0), ruler.sample("niah_multivalue", 0)
    assert chain.gold == " ".join(chain.answers)
    assert values.gold == f"{', '.join(values.answers[:-1])} and {values.answers[-1]}"
    assert Ruler(loaded[1], 2048).sample("cwe", 0).gold.startswith("1. ")
    assert Sample("c", "q", "", ["a", "b"], "t", 4).gold == "a, b"
    assert Sample("c", "q", "", ["a", "b"], "t", 4, "part").gold == "a"


def test_a_space_stands_between_prefix_and_answer(loaded: Loaded) -> None:
    family = family_of(loaded)
    for prompt in family.prompts:
        assert loaded[1].decode(family.answer_ids(prompt)) == f" {sample_of(prompt).gold}"


def test_nan_stops_the_run(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(loaded)
    monkeypatch.setattr(given_tokens, "continuation", lambda model, ids, *a: torch.full((*ids.shape, 8), float("nan")))
    with pytest.raises(RunError, match="NaN"):
        family.measure(loaded[0], family.prompts, cache_of(loaded, family))


def test_both_scores_of_a_prompt_are_kept_apart(model_folder: Path, tmp_path: Path) -> None:
    words = [f"model={model_folder}", "ckpt=knorm", "tasks=vt", "lengths=384", "samples=1", "keep=0.5"]
    for score in ("generated", "forced", "generated"):
        assert main(["eval", *words, f"score={score}", f"output={tmp_path}"]) == 0
    metrics = [record["metric"] for record in Store(tmp_path / "samples.jsonl").records.values()]
    assert sorted(metrics) == ["forced", "forced", "generated", "generated"]
    assert (tmp_path / "results.md").read_text().count("## Query-agnostic") >= 2
