"""Whatever parts a policy has, what `eval.py` loads of its export keeps, reads and says the same, bit for bit."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from support.models import build, kept, padded, tokens
from transformers import PreTrainedModel

from learnkv import attach, continuation, prefill, save_policy
from learnkv.allocators import AdaKV, LayerByLayer, LearnedAllocator, LearnedSequentialAllocator, Pyramid, Uniform
from learnkv.core.adapter import Adapter
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.run import load_policies
from learnkv.inference import lora as adapters
from learnkv.inference.models import describe_model
from learnkv.pages import Quest
from learnkv.persistence.policies import GRID
from learnkv.policy.policy import Policy
from learnkv.scorers import H2O, GateScorer, HiddenScorer, LearnedScorer, SnapKV

LAYERS, HEADS, DIM, HIDDEN = 3, 2, 16, 48
MEASURED = {keep: [[keep] * HEADS] * LAYERS for keep in GRID}

SCORERS = {
    "heuristic": lambda: SnapKV(window=8),
    "learned": lambda: LearnedScorer(SnapKV(window=8), LAYERS, HEADS, DIM, width=5, window=12),
    "gate": lambda: GateScorer(SnapKV(window=8), LAYERS, HEADS, HIDDEN, num_groups=2),
    "hidden": lambda: HiddenScorer(SnapKV(window=8), LAYERS, HEADS, DIM, HIDDEN, reads=("hidden", "values")),
}
ALLOCATORS = {
    "heuristic": lambda: AdaKV(Pyramid()),
    "learned": lambda: LearnedAllocator(Pyramid(), LAYERS, HEADS),
    "conditioned": lambda: LearnedAllocator(Uniform(), LAYERS, HEADS, conditioned=True, window=9),
    "ranked": lambda: LearnedAllocator(AdaKV(), LAYERS, HEADS, conditioned=True, by="scores"),
    "causal": lambda: LearnedSequentialAllocator(LayerByLayer(), LAYERS, HEADS, window=9),
}
PAGES = {"none": {}, "some": {"pages": Quest(page_size=4, dense_layers=1), "read": 0.5}}
LATER = {"all": {}, "judged": {"evict_interval": 5}, "otherwise": {"evict_interval": 4, "decode": H2O()}}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return attach(build("llama"))


def disturbed(module: torch.nn.Module | None, seed: int) -> torch.nn.Module | None:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data.normal_(generator=generator)
    return module


def adapter(model: PreTrainedModel) -> Adapter:
    """One that changes the logits."""
    new = Adapter(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
    adapters.add(model, new)
    for at, weight in enumerate(adapters.weights(model, new).values()):
        weight.data.normal_(generator=torch.Generator().manual_seed(at))
    held = adapters.current_weights(model, new)
    adapters._remove(model, new.name)
    return held


@torch.no_grad()
def kept_and_logits(model: PreTrainedModel, policy: Policy, keep: float) -> tuple[list[Any], list[Any], torch.Tensor]:
    """What is kept of two prompts, what after more tokens, and the logits of these."""
    held = prefill(model, *padded([tokens(1, 90)[0], tokens(1, 61)[0]]), policy=policy, keep=keep)
    at_first = [kept(held, row) for row in (0, 1)]
    more = tokens(2, 11, seed=7)
    logits = torch.stack([continuation(model, one, held)[:, -1] for one in more.split(1, 1)])
    after = [layer.kept_positions(row, head) for layer in held.compressed_layers() for row in (0, 1) for head in (0, 1)]
    return at_first, [one.tolist() for one in after], logits


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])  # a smaller case would tell no more
@given(
    scorer=st.sampled_from(sorted(SCORERS)),
    allocator=st.sampled_from(sorted(ALLOCATORS)),
    adapted=st.booleans(),
    pages=st.sampled_from(sorted(PAGES)),
    online=st.sampled_from(sorted(LATER)),
    rerotate=st.sampled_from([None, "start", "end"]),
    protected=st.sampled_from([(4, 8), (0, 3), (2, 0)]),
    keep=st.floats(0.05, 0.7),
    seed=st.integers(0, 1000),
)
@example("learned", "conditioned", True, "some", "otherwise", "end", (2, 4), 0.3, 1)
@example("learned", "conditioned", True, "none", "judged", None, (2, 4), 0.15, 2)
@example("learned", "learned", True, "some", "all", None, (4, 8), 0.2, 3)
@example("learned", "causal", True, "none", "judged", None, (2, 4), 0.15, 5)
@example("gate", "ranked", True, "none", "all", None, (2, 4), 0.2, 6)
@example("hidden", "ranked", False, "some", "otherwise", "start", (2, 4), 0.4, 7)
@example("gate", "learned", False, "none", "judged", None, (2, 4), 0.3, 8)
@example("heuristic", "conditioned", False, "none", "all", None, (4, 8), 0.06, 4)
def test_every_combination_of_parts_comes_back(
    model: PreTrainedModel,
    scorer: str,
    allocator: str,
    adapted: bool,
    pages: str,
    online: str,
    rerotate: str | None,
    protected: tuple[int, int],
    keep: float,
    seed: int,
) -> None:
    sinks, recent = protected
    made = Policy(
        SCORERS[scorer](), ALLOCATORS[allocator](), sinks, recent, rerotate=rerotate, **PAGES[pages], **LATER[online]
    )
    disturbed(made, seed).eval()
    if adapted:
        made.adapter = adapter(model)
    with tempfile.TemporaryDirectory() as name:
        folder = save_policy(
            made,
            Path(name) / "learned-x",
            model=describe_model(model),
            budgets=None if made.allocator.static else MEASURED,
        )
        (loaded,) = load_policies(EvalConfig(ckpt=(str(folder),), tasks=("niah_single_1",)), model).values()
    assert loaded.spec() == made.spec()
    ours, theirs = kept_and_logits(model, made, keep), kept_and_logits(model, loaded, keep)
    assert theirs[0] == ours[0]
    assert theirs[1] == ours[1]
    assert torch.equal(theirs[2], ours[2])
    if adapted:  # the adapter is not a bystander
        loaded.adapter = None
        assert not torch.equal(kept_and_logits(model, loaded, keep)[2], ours[2])
