"""What is measured of a model's queries and of KVzip's scores, against the model itself."""

from pathlib import Path

import pytest
import torch
from support.models import Loaded
from torch import Tensor
from transformers import PreTrainedModel

from learnkv import load_model, load_policy, prefill
from learnkv.calibration.kvzip_gate import kvzip_gate
from learnkv.calibration.moments import query_moments
from learnkv.calibration.trials import sample_trials
from learnkv.formats import tensors
from learnkv.formats.files import TABLES
from learnkv.policy.policy import Policy
from learnkv.scorers import KVzip
from learnkv.scorers.fast_kvzip import gate_scores


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model("reference")


@pytest.fixture(scope="module")
def contexts(loaded: Loaded) -> list[Tensor]:
    return [trial.context for trial in sample_trials(loaded[1], 192, 4, seed=3)]


def test_moments_are_those_of_all_queries_before_rotation(loaded: Loaded, contexts: list[Tensor]) -> None:
    model, shown = loaded[0], []
    projection = model.model.layers[2].self_attn.q_proj
    hook = projection.register_forward_hook(lambda module, given, made: shown.append(made[0, 4:].double()))
    with torch.no_grad():
        for context in contexts:
            model(input_ids=context)
    hook.remove()
    queries = torch.cat(shown).unflatten(1, (8, -1)).transpose(0, 1)  # [N, T, D]
    found = query_moments(model, contexts)
    torch.testing.assert_close(found["mean"][2], queries.mean(1), rtol=1e-3, atol=1e-4)
    theirs = torch.stack([torch.cov(head.T, correction=0) for head in queries])
    torch.testing.assert_close(found["covariance"][2], theirs, rtol=1e-3, atol=1e-3)


def agreement(weights: dict[str, Tensor], model: PreTrainedModel, context: Tensor) -> float:
    """Mean correlation over layers and heads between gate and KVzip, of a context."""

    class Both(KVzip):
        needs = frozenset({"hidden"})

    kvzip = Policy(Both())
    found = []
    for at, layer in enumerate(prefill(model, context, policies=[kvzip]).compressed_layers()):
        seen = layer.observation()
        guessed = gate_scores({name: one[at] for name, one in weights.items()}, seen.hidden)[0]
        pairs = torch.stack([guessed, kvzip.scorer(seen)[0]], 1).sqrt()  # [H, 2, S]
        found += [torch.corrcoef(pair)[0, 1] for pair in pairs]
    return float(torch.stack(found).mean())


def test_a_gate_learns_to_tell_kvzips_scores(loaded: Loaded, contexts: list[Tensor]) -> None:
    model = loaded[0]
    start, learned = (kvzip_gate(model, contexts[:3], steps, batch=256) for steps in (1, 80))
    assert agreement(start, model, contexts[3]) < 0.2
    assert agreement(learned, model, contexts[3]) > 0.45
    assert [tuple(one.shape) for one in learned.values()] == [tuple(one.shape) for one in shipped().values()]


def shipped() -> dict[str, torch.Tensor]:
    return tensors.read(TABLES / "kvzip_gate.safetensors", tensors.KVZIP_GATE)


def test_the_shipped_gate_and_moments_are_the_reference_models(loaded: Loaded, contexts: list[Tensor]) -> None:
    model = loaded[0]
    assert agreement(shipped(), model, contexts[3]) > 0.6
    held = tensors.read(TABLES / "query_moments.safetensors", tensors.MOMENTS)
    here = query_moments(model, contexts)
    for name in tensors.MOMENTS:
        assert float(torch.corrcoef(torch.stack([held[name].flatten(), here[name].flatten().float()]))[0, 1]) > 0.95
    for name in ("fast_kvzip", "expected_attention_measured"):
        policy = load_policy(name)
        assert prefill(model, contexts[0], policy=policy, keep=0.25).spent == pytest.approx([0.25], abs=1e-3)


@pytest.mark.parametrize(
    ("held", "word"),
    [({}, r"expected mean of shape \[L, N, D\], got \[\]"), ({"mean": torch.zeros(2, 3, 4)}, "expected covariance")],
)
def test_a_file_of_something_else_is_named(held: dict[str, Tensor], word: str, tmp_path: Path) -> None:
    tensors.write(tmp_path / "file", held)
    with pytest.raises(tensors.UserError, match=word):
        tensors.read(tmp_path / "file", tensors.MOMENTS)
    with pytest.raises(tensors.UserError, match="cannot be read"):
        tensors.read(tmp_path / "nothing", tensors.MOMENTS)
