"""The heuristics as users name them."""

from typing import Any

import pytest
import yaml

from learnkv import allocators, scorers
from learnkv.allocators import LUKV, AdaKV, DuoAttention, Flat, HeadKV, Pyramid, Uniform
from learnkv.persistence.named_configs import CONFIGS
from learnkv.persistence.policies import load_policy
from learnkv.scorers import (
    H2O,
    RKV,
    TOVA,
    KeyDiff,
    Knorm,
    KVzip,
    ObservedAttention,
    PromptOrder,
    Random,
    SnapKV,
    StreamingLLM,
)

MADE_OF = {
    "full": (type(None), Uniform),
    "quest": (type(None), Uniform),
    "streaming_llm": (StreamingLLM, Uniform),
    "snapkv": (SnapKV, Uniform),
    "pyramidkv": (SnapKV, Pyramid),
    "adakv": (SnapKV, AdaKV),
    "adapyramidkv": (SnapKV, AdaKV),
    "headkv": (SnapKV, HeadKV),
    "lukv": (SnapKV, LUKV),
    "locos": (SnapKV, HeadKV),
    "heterocache": (SnapKV, allocators.HeteroCache),
    "momentkv": (SnapKV, Uniform),
    "momentkv_means": (SnapKV, Uniform),
    "nll_layers": (StreamingLLM, allocators.NLLLayers),
    "flux_attention": (StreamingLLM, allocators.FluxAttention),
    "delta": (type(None), Uniform),
    "louver": (type(None), Uniform),
    "sink_router": (type(None), Uniform),
    "heterocache_reload": (type(None), Uniform),
    "duo_attention": (StreamingLLM, DuoAttention),
    "compresskv": (scorers.CompressKV, allocators.CompressKV),
    "chunkkv": (scorers.Chunked, Uniform),
    "h2o_decode": (scorers.H2O, Uniform),
    "rkv_decode": (scorers.RKV, Uniform),
    "cake_decode": (scorers.CAKE, allocators.CAKE),
    "cake": (scorers.CAKE, allocators.CAKE),
    "tgv_kv": (scorers.TGVKV, allocators.TGVKV),
    "lava": (scorers.LAVa, AdaKV),
    "knorm": (Knorm, Uniform),
    "random": (Random, Uniform),
    "protection_only": (PromptOrder, Uniform),
    "tova": (TOVA, Uniform),
    "keydiff": (KeyDiff, Uniform),
    "rkv": (RKV, Uniform),
    "fastkv": (SnapKV, Uniform),
    "h2o": (H2O, Uniform),
    "kvgrad": (scorers.KVgrad, Flat),
    "indexmem": (scorers.IndexMem, Uniform),
    "kvzip": (KVzip, Flat),
    "observed_attention": (ObservedAttention, Uniform),
    "expected_attention": (scorers.ExpectedAttention, Uniform),
    "expected_attention_measured": (scorers.ExpectedAttention, Uniform),
    "fast_kvzip": (scorers.FastKVzip, Flat),
    "criticalkv": (scorers.CriticalKV, Uniform),
    "critical_adakv": (scorers.CriticalKV, AdaKV),
    "defensivekv": (scorers.DefensiveKV, AdaKV),
    "layer_defensivekv": (scorers.DefensiveKV, Flat),
    "restkv": (scorers.ReSTKV, Uniform),
    "vase": (scorers.VaSE, Uniform),
    "vase_decode": (scorers.VaSE, Uniform),
    "vase_dkv": (scorers.DKV, Uniform),
    "dropkv": (scorers.DropKV, Uniform),
    "triattention": (scorers.TriAttention, Uniform),
    "triattention_decode": (scorers.TriAttention, Uniform),
    "shotkv": (scorers.ShotKV, Uniform),
    "snapstream": (SnapKV, Uniform),
    "thought_hierarchy": (scorers.ThoughtHierarchy, Uniform),
    "laprox": (scorers.LaProx, Flat),
    "kvec": (scorers.KVEC, Uniform),
    "ams": (scorers.AMS, Uniform),
    "ams_decode": (scorers.AMS, Uniform),
    "trimkv": (scorers.TrimKV, Uniform),
    "trimkv_decode": (scorers.TrimKV, Uniform),
    "dbtrimkv": (scorers.TrimKV, Flat),
    "dbtrimkv_decode": (scorers.TrimKV, Flat),
}


SHIPPED = {path.stem: path for path in (CONFIGS / "policies").glob("*.yaml")}


@pytest.mark.parametrize("name", MADE_OF)
def test_a_heuristic_is_made_of_what_its_name_says(name: str) -> None:
    policy = load_policy(name)
    assert (type(policy.scorer), type(policy.allocator)) == MADE_OF[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_heuristic_has_nothing_to_train_and_is_what_its_yaml_says(name: str) -> None:
    policy = load_policy(name)
    assert not list(policy.parameters())
    assert (policy.sinks, policy.recent) == (4, 8)
    spec = yaml.safe_load(SHIPPED[name].read_text())
    assert within(spec, policy.spec())


def within(typed: float | str | dict[str, Any], built: float | str | dict[str, Any]) -> bool:
    """Whether what a YAML says is part of what was built."""
    if isinstance(typed, dict):
        return typed.keys() <= built.keys() and all(within(value, built[key]) for key, value in typed.items())
    return typed == built


@pytest.mark.parametrize("name", SHIPPED)
def test_the_first_line_of_a_yaml_says_what_the_method_is(name: str) -> None:
    assert SHIPPED[name].read_text().startswith("# ")


def test_comparisons_differ_in_one_thing_only() -> None:
    """Budgets are compared on the same scores, and the pyramid leaves out what the policy protects."""
    snapkv, pyramidkv, adakv = (load_policy(name) for name in ("snapkv", "pyramidkv", "adakv"))
    assert snapkv.scorer.spec() == pyramidkv.scorer.spec() == adakv.scorer.spec()
    assert pyramidkv.allocator.protected == pyramidkv.sinks + pyramidkv.recent
    assert load_policy("streaming_llm").scorer.sinks == snapkv.sinks
