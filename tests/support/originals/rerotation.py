"""Keys that are rotated to consecutive positions, as in kvpress."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.observation import Observation
from learnkv.ops.rotary import Layout, Rotary
from learnkv.policy.policy import Policy
from learnkv.scorers import Scorer
from support.originals.comparing import assert_scores
from support.originals.loading import Case, inputs_of, policy

NAMES = {"StreamingLLM": "streaming_llm", "KeyDiff": "keydiff", "Knorm": "knorm"}


class Given(Scorer):
    """The entries that someone else kept."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, obs: Observation) -> Tensor:
        return torch.zeros(obs.valid.shape).scatter(2, self.kept.long(), 1.0)


class Rotating:
    """A layer of which the rotation is known."""

    def __init__(self, rope: Rotary) -> None:
        self.rope = rope

    def rotary(self, *_: object) -> Rotary:
        return self.rope

    projection = None


def check_rerotation(case: Case) -> None:
    """A cache of one layer evicts as it would for a model."""
    params, inputs = case.params, inputs_of(case)
    kept, keys = case["kept"], case["keys_out"]
    named = params["press"] in NAMES  # where it is not, the family's own checks compare what is kept
    scorer = policy(NAMES[params["press"]]).scorer if named else Given(torch.from_numpy(kept))
    rotating = Policy(scorer, sinks=0, recent=0, rerotate="start")
    cache = CompressedCache(LlamaConfig(num_hidden_layers=1), rotating.capture_spec)
    (layer,) = cache.compressed_layers()
    slots, dim = inputs["k"].shape[2:]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (torch.arange(slots).unsqueeze(-1) * frequency).unsqueeze(0)
    functions: Any = Rotating(Rotary(((angle.cos().float(), angle.sin().float()),), Layout.halves(dim // 2)))
    layer.capture.functions = functions
    layer.capture.scaling = dim**-0.5
    with torch.no_grad():
        layer.expects_attention = True
        layer.update(inputs["k"], inputs["v"])
        layer.observe(inputs["q"], None)
        rotating.compress(cache, budget=params["n_kept"])
    batch, heads = kept.shape[:2]
    for row in range(batch):
        for head in range(heads):
            assert cache.kept_positions(0, row, head).tolist() == kept[row, head].tolist()
            begin = int(layer.segment.offset[row * heads + head])
            ours = layer.segment.keys[begin : begin + kept.shape[2]]
            assert_scores(ours.numpy(), keys[row, head], atol=2e-5)


FAMILIES = {"kvpress_rerotate": check_rerotation}
