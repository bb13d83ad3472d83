"""LOCOS' head scores: each head's own addition to the logit, and heads of the reference model that retrieve."""

import pytest
import torch

from learnkv import load_model, load_policy
from learnkv.calibration.contributions import logit_heads
from learnkv.calibration.trials import sample_trials
from learnkv.errors import RunError
from learnkv.formats import headkv
from learnkv.formats.files import TABLES
from learnkv.ops.logit_contribution import logit_contribution, on_and_off


def test_contributions_add_up_to_what_the_layer_s_output_gives() -> None:
    draw = torch.Generator().manual_seed(0)
    attention = torch.rand(2, 3, 4, 11, generator=draw).softmax(-1)
    values, projection = torch.randn(2, 11, 5, generator=draw), torch.randn(7, 30, generator=draw)
    rows = torch.randn(4, 7, generator=draw)
    added = logit_contribution(attention, values, projection, rows)
    output = torch.einsum("hgas,hsd->ahgd", attention, values).flatten(1) @ projection.T
    torch.testing.assert_close(added.sum((0, 1, 3)), (output * rows).sum(-1))
    on, off = on_and_off(added, (2, 5))
    torch.testing.assert_close(on + off * 8 / 3, added.sum(-1))


def test_the_heads_that_retrieve_are_those_that_add_to_the_answer() -> None:
    model, tokenizer = load_model("reference")
    trials = list(sample_trials(tokenizer, 128, 2, seed=3))
    scores = headkv.mean_scores(logit_heads(model, trials))
    assert scores.shape == (6, 8)
    assert scores[4:].max() > 20 * scores[:4].max()
    wrong = type(trials[0])(**{**vars(trials[0]), "answer": trials[0].answer + 1})
    with pytest.raises(RunError, match="answered none of 1 trials"):
        logit_heads(model, [wrong])


def test_the_shipped_table_agrees_with_the_retrieval_scores() -> None:
    added, attended = (headkv.mean_scores(headkv.read(TABLES / f"{name}_heads.json")) for name in ("logit", "semantic"))
    best = [set(scores.flatten().topk(4).indices.tolist()) for scores in (added, attended)]
    assert len(best[0] & best[1]) >= 3
    assert set(load_policy("locos").allocator.importance.flatten().topk(4).indices.tolist()) == best[0]
