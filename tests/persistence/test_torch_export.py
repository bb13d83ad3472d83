"""Budgets as a `torch.export` program: the policy's own, for any batch and length, where learnkv is not installed."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from support.commands import export
from support.models import attached, padded, policy_for, tokens
from support.observations import randomised
from torch import Tensor

from learnkv import Policy, prefill, save_policy
from learnkv.allocators import AdaKV, LayerByLayer, LearnedAllocator, LearnedSequentialAllocator, Pyramid, Uniform
from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.inference.models import describe_model
from learnkv.persistence.torch_export import DESCRIPTION, export_budgets
from learnkv.scorers import LearnedScorer, SnapKV

SHAPES = {"layers": 3, "heads": 2, "head_dim": 16}
LENGTHS = [[90, 61, 75], [40, 23], [130]]
RUN = """
import sys
sys.modules["learnkv"] = None  # nothing of ours is imported
import torch
program = torch.export.load(sys.argv[1]).module()
asked = torch.load(sys.argv[2], weights_only=True)
torch.save([program(**one) for one in asked], sys.argv[3])
"""


def asked(policy: Policy, rows: list[int], keep: float) -> tuple[dict[str, Tensor], Tensor]:
    """What goes into the program for a batch of prompts, and the budgets that the policy gives them."""
    cache = prefill(attached("llama"), *padded([tokens(1, row)[0] for row in rows]), policies=[policy])
    wanted = policy.plan(cache, keep=keep).budgets
    slots = torch.arange(max(rows))
    given = {"keep": torch.full((len(rows),), keep, dtype=torch.float64)}
    given["valid"] = slots >= max(rows) - torch.tensor(rows).unsqueeze(-1)
    seen = [layer.observation() for layer in cache.compressed_layers()]
    if policy.allocator.conditioned:
        given["features"] = torch.stack([policy.allocator.features(one) for one in seen])
    if not policy.allocator.base.static:
        given["scores"] = torch.stack([policy.scorer.base(one) for one in seen])
    return given, wanted


@pytest.mark.parametrize("name", ["conditioned", "over scores"])
@torch.no_grad()
def test_a_program_gives_the_budgets_of_its_policy_without_learnkv(name: str, tmp_path: Path) -> None:
    if name == "conditioned":
        policy = policy_for("conditioned", attached("llama"))
        budgets = {0.1: [[0.1] * 2] * 3}
        save_policy(policy, tmp_path / "policy", model=describe_model(attached("llama")), budgets=budgets)
        words = [f"ckpt={tmp_path / 'policy'}", f"out={tmp_path / 'deep' / 'budgets.pt2'}", "format=torch-export"]
        assert export(words) == 0
    else:
        scorer = randomised(LearnedScorer(SnapKV(window=8), 3, 2, 16))
        policy = Policy(scorer, randomised(LearnedAllocator(AdaKV(), 3, 2)), sinks=2, recent=5)
        export_budgets(tmp_path / "deep" / "budgets.pt2", policy, SHAPES)
    file = tmp_path / "deep" / "budgets.pt2"
    cases = [asked(policy, rows, keep) for rows, keep in zip(LENGTHS, (0.3, 0.07, 0.513), strict=True)]
    if name == "conditioned":
        torch.save([given for given, _ in cases], tmp_path / "in.pt")
        command = [sys.executable, "-c", RUN, str(file), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
        got = torch.load(tmp_path / "out.pt", weights_only=True)
    else:
        program = torch.export.load(file).module()
        got = [program(**given) for given, _ in cases]
    for (_, wanted), one, rows in zip(cases, got, LENGTHS, strict=True):
        assert torch.equal(one, wanted)
        assert len(rows) == one.shape[1]
        assert one.unique().numel() > 2  # heads that differ, or there would be nothing to compare
    with zipfile.ZipFile(file) as archive:
        (about,) = [json.loads(archive.read(one)) for one in archive.namelist() if one.endswith(DESCRIPTION)]
    assert about["inputs"].keys() == cases[0][0].keys()
    assert (about["layers"], about["heads"], about["sinks"], about["recent"]) == (3, 2, policy.sinks, policy.recent)


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_budgets(tmp_path / "a file" / "x.pt2", Policy(SnapKV(), LearnedAllocator(AdaKV(), 3, 2)), SHAPES)
    with pytest.raises(UserError, match="AdaKV: has nothing learned"):
        export_budgets(tmp_path / "x.pt2", Policy(SnapKV(), AdaKV()), SHAPES)
    with pytest.raises(UserError, match="precision=4: a program has budgets in entries"):
        export_budgets(tmp_path / "x.pt2", Policy(SnapKV(), LearnedAllocator(AdaKV(), 3, 2), precision=4), SHAPES)
    with pytest.raises(UserError, match="by: shares"):
        export_budgets(tmp_path / "x.pt2", Policy(SnapKV(), LearnedAllocator(AdaKV(), 3, 2, by="scores")), SHAPES)


@pytest.mark.parametrize(
    ("allocator", "by_scores"),
    [
        (LearnedAllocator(Pyramid(), 3, 2, conditioned=True), False),
        (LearnedAllocator(AdaKV(), 3, 2), True),
        (LearnedSequentialAllocator(Uniform(), 3, 2), False),
        (LearnedSequentialAllocator(LayerByLayer(), 3, 2), True),
    ],
)
@torch.no_grad()
def test_who_is_not_shown_scores_does_not_look_at_them(allocator: Allocator, by_scores: bool) -> None:
    randomised(allocator)
    features, budget = torch.rand(3, 1, 2, 3), torch.tensor([9.0], dtype=torch.float64)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    budgets = [allocator(torch.randn(3, 1, 2, 40, generator=seed), features, budget) for seed in seeds]
    assert allocator.needs_scores == by_scores
    assert torch.equal(*budgets) != by_scores
