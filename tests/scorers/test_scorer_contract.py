"""What the cache and the policy rely on, for every scorer there is."""

import dataclasses
from typing import Any

import pytest
import torch
from support import components
from support.components import KNOWS_ITS_HEAD, SCORERS
from support.kernels import capped_with_sinks
from support.observations import observe, permuted

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.softmax_terms import SoftmaxTerms

every_scorer = pytest.mark.parametrize("cls", SCORERS)


def build(cls: type[Scorer]) -> Scorer:
    return components.build(cls, 2, 2, 3, 16)


def seen_by(scorer: Scorer, lengths: list[int], **more: Any) -> Observation:
    return observe(lengths, statistics=scorer.capture_spec.statistics, extra_passes=scorer.extra_passes, **more)


def test_the_walk_finds_the_scorers() -> None:
    assert {"Knorm", "Random", "SnapKV", "StreamingLLM"} <= {cls.__name__ for cls in SCORERS}


@every_scorer
def test_a_padded_row_gets_what_it_gets_alone(cls: type[Any]) -> None:
    scorer, lengths = build(cls), [61, 33, 32, 9, 3, 1]
    together = scorer(seen_by(scorer, lengths, window=32))
    for row, length in enumerate(lengths):
        alone = scorer(seen_by(scorer, [length], window=32))
        torch.testing.assert_close(together[row : row + 1, :, -length:], alone, rtol=1e-5, atol=1e-6)


@every_scorer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_finite_float32_whatever_the_model_computes_in(cls: type[Any], dtype: torch.dtype) -> None:
    scorer = build(cls)
    obs = seen_by(scorer, [40, 12])
    changed = {name: getattr(obs, name).to(dtype) for name in ("queries", "keys", "values", "hidden")}
    weight = obs.projection.to(dtype)
    scores = scorer(dataclasses.replace(obs, project=lambda: weight, **changed))
    assert scores.dtype == torch.float32
    assert scores.shape == obs.valid.shape
    assert scores[obs.valid].isfinite().all()


@every_scorer
def test_a_model_in_double_precision_gets_the_same_scores(cls: type[Any]) -> None:
    scorer = build(cls)
    obs = seen_by(scorer, [40, 12])
    changed = {name: getattr(obs, name).double() for name in ("queries", "keys", "values", "hidden")}
    weight = obs.projection.double()
    scores = scorer(dataclasses.replace(obs, project=lambda: weight, **changed)).float()
    torch.testing.assert_close(scores[obs.valid], scorer(obs)[obs.valid], rtol=1e-3, atol=1e-5)


@every_scorer
def test_entries_that_are_not_there_are_not_read(cls: type[Any]) -> None:
    scorer = build(cls)
    obs = seen_by(scorer, [40, 25])
    holes = torch.rand(obs.valid.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    valid = obs.valid & ~holes
    scores = []
    for filling in (0.0, 100.0, torch.nan):
        filled = {name: getattr(obs, name).masked_fill(~valid.unsqueeze(-1), filling) for name in ("keys", "values")}
        scores.append(scorer(dataclasses.replace(obs, valid=valid, **filled))[valid])
    assert scores[0].isfinite().all()
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


@every_scorer
def test_a_wider_recording_changes_nothing(cls: type[Any]) -> None:
    """Another component may ask for more queries than this one."""
    scorer = build(cls)
    wide, narrow = seen_by(scorer, [70], window=70), seen_by(scorer, [70], window=scorer.window)
    assert torch.equal(scorer(wide), scorer(narrow))


@pytest.mark.parametrize("cls", [cls for cls in SCORERS if cls not in KNOWS_ITS_HEAD])
def test_permuted_heads_give_permuted_scores(cls: type[Any]) -> None:
    order, scorer = [2, 0, 3, 1], build(cls)
    obs = seen_by(scorer, [40, 25], heads=4)
    got = scorer(permuted(obs, order))
    torch.testing.assert_close(got[obs.valid], scorer(obs)[:, order][obs.valid], rtol=1e-5, atol=1e-7)


READS_NO_ATTENTION = {
    *(
        "Constant",
        "DKV",
        "FastKVzip",
        "IndexMem",
        "KVec",
        "KeyDiff",
        "Knorm",
        "PromptOrder",
        "Random",
        "StreamingLLM",
        "TokenwiseMLP",
    ),
    *("KVgrad", "KVzip", "KVzipPlus", "Repetition", "SnapStream"),  # extra passes are made up here
    *("TriAttention", "TrimKV"),
}


@every_scorer
@pytest.mark.parametrize("term", ["softcap", "sinks"])
def test_attention_is_the_models_own(cls: type[Any], term: str) -> None:
    """Scorers that read attention weights read those with a soft cap and sinks."""
    scorer, terms = build(cls), capped_with_sinks(6)
    only = SoftmaxTerms(0.1, None) if term == "softcap" else SoftmaxTerms(None, terms.sinks)
    plain = seen_by(scorer, [40, 25])
    if cls.__name__ == "ExpectedAttention" and term == "softcap":
        with pytest.raises(UserError, match=r"^ExpectedAttention: .* soft-capped logits, expected covariance=false$"):
            scorer(seen_by(scorer, [40, 25], terms=only))
        scorer = cls(covariance=False)
    scores, others = (scorer(obs)[plain.valid] for obs in (plain, seen_by(scorer, [40, 25], terms=only)))
    assert torch.equal(scores, others) == (cls.__name__ in READS_NO_ATTENTION)
