"""Shipped methods, their kinds, and selections of them."""

import json
from pathlib import Path

import pytest
import torch

from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.errors import UserError
from learnkv.formats import files
from learnkv.formats.files import TABLES
from learnkv.persistence import policies
from learnkv.persistence.methods import FULL, KINDS, kinds_of, method, select_methods
from learnkv.persistence.named_configs import CONFIGS
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy
from learnkv.scorers import ExpectedAttention, SnapKV


def test_all_is_every_yaml_but_the_full_cache() -> None:
    of_bytes = select_methods(["precision"])
    assert of_bytes == [
        "kivi",
        "logquant",
        "oscar_rotation",
        "oscar_token_norm",
        "quantized_4bit",
        "rdkv",
        "think",
        "turboquant",
    ]
    assert {*select_methods(), *of_bytes, FULL} == {path.stem for path in (CONFIGS / "policies").glob("*.yaml")}
    assert not {*select_methods()} & {*of_bytes}
    assert select_methods(["all"]) == sorted(select_methods())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("knorm", set()),
        ("snapkv", {"observation_window"}),
        ("chunkkv", {"observation_window"}),
        ("h2o_decode", {"online"}),
        ("cake_decode", {"online", "observation_window"}),
        ("kvzip", {"extra_passes"}),
        ("quest", {"pages"}),
        ("delta", {"pages"}),
        ("louver", {"pages"}),
        ("sink_router", {"pages", "observation_window"}),
        ("heterocache_reload", {"calibrated", "pages", "observation_window"}),
        ("duo_attention", {"calibrated", "trained"}),
        ("fast_kvzip", {"calibrated", "trained"}),
        ("flux_attention", {"calibrated", "trained", "observation_window"}),
        ("indexmem", {"calibrated", "trained", "observation_window"}),
        ("trimkv", {"calibrated", "trained"}),
        ("dbtrimkv", {"calibrated", "trained"}),
        ("trimkv_decode", {"calibrated", "trained", "online"}),
        ("dbtrimkv_decode", {"calibrated", "trained", "online"}),
        ("snapstream", {"online", "observation_window"}),
        ("ams_decode", {"online", "observation_window"}),
        ("thought_hierarchy", {"online"}),
        ("vase_decode", {"online", "observation_window"}),
        ("vase_dkv", {"online"}),
        ("triattention", set()),
        ("triattention_decode", {"calibrated", "online"}),
        ("headkv", {"calibrated", "observation_window"}),
        ("compresskv", {"calibrated", "observation_window"}),
        ("expected_attention", set()),
        ("expected_attention_measured", {"calibrated"}),
    ],
)
def test_kinds_follow_from_the_components(name: str, kinds: set[str]) -> None:
    assert method(name).kinds == kinds


def test_a_kind_of_a_component_within_another_counts() -> None:
    wrapped = Policy(load_policy("criticalkv").scorer.__class__(ExpectedAttention(moments="reference")))
    assert kinds_of(wrapped) == {"calibrated"}
    assert kinds_of(Policy(SnapKV(), LearnedAllocator(Uniform(), 2, 2))) == {"trained", "observation_window"}
    assert "trained" in kinds_of(load_policy("reference"))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], []),
        (["snapkv", "knorm", "snapkv"], ["snapkv", "knorm"]),
        (
            ["pages", "extra_passes"],
            ["delta", "heterocache_reload", "louver", "quest", "sink_router", "kvgrad", "kvzip"],
        ),
        (
            ["trained", "-duo_attention"],
            ["dbtrimkv", "dbtrimkv_decode", "fast_kvzip", "flux_attention", "indexmem", "trimkv", "trimkv_decode"],
        ),
        (["knorm", "all", "-all", "random"], ["random"]),
        (["./mine.yaml", "full"], ["./mine.yaml", "full"]),
    ],
)
def test_words_add_and_take_away_in_order(words: list[str], names: list[str]) -> None:
    assert select_methods(words) == names


def test_a_selection_that_begins_by_taking_away_begins_with_all() -> None:
    assert select_methods(["-online", "-random"]) == select_methods(["all", "-random", "-online"])
    assert set(select_methods()) - set(select_methods(["-online", "-random"])) == {
        *select_methods(["online"]),
        "random",
    }


@pytest.mark.parametrize(("word", "near"), [("snapvk", "snapkv"), ("-snapvk", "snapkv"), ("trainde", "trained")])
def test_a_mistyped_word_is_answered_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        select_methods(["all", word], "methods")
    assert str(error.value).startswith(f"methods={word}: expected all, a kind ({', '.join(KINDS)}) or a method")
    assert str(error.value).endswith(f"; did you mean {near}?")


def test_a_method_takes_the_tables_of_a_model_that_ships_with_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its bare name; a YAML of one's own says itself which file it reads."""
    scores = json.loads((TABLES / "head_scores.json").read_text())
    other = {head: [score / 2 + index for score in values] for index, (head, values) in enumerate(scores.items())}
    (tmp_path / "head_scores.json").write_text(json.dumps(other))
    monkeypatch.setitem(files.MODELS_WITH_TABLES, "smollm2", tmp_path)
    plain, own = load_policy("headkv"), load_policy("headkv", model={"id": "smollm2"})
    assert own.spec()["allocator"]["init_args"]["scores"] == "smollm2"
    assert plain.spec()["allocator"]["init_args"]["scores"] == "reference"
    assert not torch.equal(own.allocator.importance, plain.allocator.importance)
    assert load_policy("headkv", model={"id": "somebody/else"}).spec() == plain.spec()
    assert load_policy(CONFIGS / "policies" / "headkv.yaml", model={"id": "smollm2"}).spec() == plain.spec()


@pytest.mark.parametrize("words", [["-all"], ["snapkv", "-snapkv"], ["-all", "-random"]])
def test_words_that_leave_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match=f"^baselines={','.join(words)}: leaves no method$"):
        select_methods(words)
    assert select_methods([]) == []


def test_trained_policies_of_one_model_that_ship_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "SHIPPED", dict.fromkeys(("smollm2", "smollm2-text", "smollm2-bytes"), Path("x")))
    names = list(map(policies.describe_policy_file, policies.SHIPPED))
    assert names == ["learned", "learned-text", "learned-bytes"]
