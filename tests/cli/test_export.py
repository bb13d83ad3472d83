"""A trained policy's budgets in the formats of other methods; the export of a checkpoint is in the training tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import export
from support.models import build

from learnkv import Policy, save_policy
from learnkv.allocators import LUKV, DuoAttention, FixedLayers, HeadKV, LearnedAllocator, Uniform
from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.formats import budgets, duo, headkv, layers, lukv, modelopt
from learnkv.inference.models import attention_layers, describe_model, empty_model
from learnkv.persistence.policies import SHIPPED
from learnkv.scorers import SnapKV

KNOWN = budgets.read(SHIPPED["reference"] / "budgets.csv")


def exported(tmp_path: Path, kind: str, *words: str) -> str:
    out = tmp_path / "deep" / kind
    assert export(["--ckpt", "reference", "--out", str(out), "--format", kind, *words]) == 0
    return str(out)


def wanted(allocator: Allocator, keep: float) -> torch.Tensor:
    """[L, H] of 1000 entries."""
    return allocator(torch.zeros(6, 1, 4, 1000), None, torch.tensor([1000 * keep], dtype=torch.float64))[:, 0]


def test_head_scores_are_the_kept_fractions(tmp_path: Path) -> None:
    file = exported(tmp_path, "headkv", "keep=0.1", "group=2")
    assert headkv.mean_scores(headkv.read(file)).shape == (6, 8)
    got = wanted(HeadKV(file, beta=1), 0.1)
    torch.testing.assert_close(got, 1000 * torch.tensor(KNOWN[0.1]).double(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_command_says_whether_budgets_depend_on_the_prompt(
    conditioned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy(SnapKV(), LearnedAllocator(Uniform(), 6, 4, conditioned=conditioned))
    about = {"id": "someone/model", "config_hash": "0", "shapes": {"layers": 6, "heads": 4, "head_dim": 32}}
    folder = save_policy(policy, tmp_path / "policy", model=about, budgets=KNOWN if conditioned else None)
    told = "mean over the validation prompts" if conditioned else "the same for every prompt"
    for kind in ("headkv", "lukv", "duo", "layers"):
        assert export([f"ckpt={folder}", f"out={tmp_path / kind}", f"format={kind}"]) == 0
        assert told in capsys.readouterr().err
    assert duo.read(tmp_path / "duo").config["static"] is not conditioned
    assert json.loads((folder / "manifest.json").read_text())["budgets"].startswith("mean" if conditioned else "static")


def test_gates_rank_heads_by_their_kept_fractions(tmp_path: Path) -> None:
    file = exported(tmp_path, "duo", "keep=0.2")
    pattern = duo.read(file)
    assert pattern.gates.max() == 1
    assert (pattern.sink, pattern.recent) == (4, 8)
    full = ~DuoAttention(file, sparsity=0.75).streaming()
    best = torch.tensor(KNOWN[0.2]).flatten().topk(6).indices
    assert set(full.flatten().nonzero().flatten().tolist()) == set(best.tolist())


def test_a_curve_evicts_what_the_target_says(tmp_path: Path) -> None:
    file = exported(tmp_path, "lukv")
    curve = lukv.read(file)
    assert curve.shape == (99, 6, 4)
    torch.testing.assert_close(
        curve.double().mean((1, 2)), torch.arange(1.0, 100.0, dtype=torch.float64) / 100, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(wanted(LUKV(file), 0.4), 1000 * torch.tensor(KNOWN[0.4]).double(), rtol=0, atol=0.02)


def test_layer_budgets_are_means_over_heads(tmp_path: Path) -> None:
    file = exported(tmp_path, "layers", "keep=0.05")
    assert layers.read(file).tolist() == pytest.approx(np.mean(KNOWN[0.05], axis=1), abs=1e-6)
    assert wanted(FixedLayers(file), 0.3).mean() == pytest.approx(300)


def test_budgets_between_those_known_are_linear() -> None:
    table = {0.2: [[0.1, 0.3]], 0.4: [[0.2, 0.6]]}
    for keep, expected in (
        (0.1, (0.05, 0.15)),
        (0.3, (0.15, 0.45)),
        (0.7, (0.6, 0.8)),
        (1.0, (1, 1)),
        (0.2, (0.1, 0.3)),
    ):
        assert budgets.interpolate(table, keep)[0].tolist() == pytest.approx(expected)


def test_a_budget_table_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "budgets.csv"
    file.write_text(budgets.text(KNOWN))
    assert budgets.read(file) == KNOWN
    assert file.read_text() == (SHIPPED["reference"] / "budgets.csv").read_text()


@pytest.mark.parametrize(
    "text", ["", "layer,head,keep_0.1\n0,x,0.5\n", "layer,head\n0,0\n", "layer,head,keep_0.1\n0,1,0.5\n"]
)
def test_another_table_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "budgets.csv").write_text(text)
    with pytest.raises(UserError, match=r"budgets.csv: expected"):
        budgets.read(tmp_path / "budgets.csv")


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["ckpt=snapkv", "format=lukv"], "ckpt=snapkv: expected a trained policy"),
        (["ckpt=reference", "format=npz"], "format=npz: expected one of"),
        (["ckpt=reference", "format=duo", "keep=0"], "keep=0 group=1: expected 0 < keep <= 1"),
        (["ckpt=reference"], "expected a checkpoint (.ckpt)"),
    ],
)
def test_what_cannot_be_exported_is_told(
    typed: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export([*typed, f"out={tmp_path}/out"]) == 2
    assert told in capsys.readouterr().err


def test_layers_get_whole_pages_within_the_budget(tmp_path: Path) -> None:
    file = exported(tmp_path, "layers", "keep=0.1", "tokens=1000", "page=16")
    pages = layers.read(file).tolist()
    assert all(tokens % 16 == 0 and tokens >= 16 for tokens in pages)
    assert sum(pages) == 600 // 16 * 16
    shares = np.mean(KNOWN[0.1], axis=1)
    assert pages == pytest.approx(shares * 1000, abs=17)
    assert layers.paged([0.9, 0.1], 1.0, 40, 16) == [40, 40]  # the last page is not full
    with pytest.raises(UserError, match=r"keep=0.1 tokens=100 page=16: 1 pages for 2 layers, expected one"):
        layers.paged([0.5, 0.5], 0.1, 100, 16)


@pytest.mark.parametrize(("bits", "mean"), [(4.5, 4.5), (6, 5.958), (6.25, 6.25), (7.9, 7.708), (8, 8)])
def test_formats_of_layers_follow_the_budgets(bits: float, mean: float, tmp_path: Path) -> None:
    formats = modelopt.read(exported(tmp_path, "modelopt", "keep=0.1", f"bits={bits}"))
    assert list(formats) == [f"model.layers.{layer}.self_attn" for layer in range(6)]
    chosen = list(formats.values())
    assert modelopt.mean_bits(chosen) == pytest.approx(mean, abs=1e-3)
    assert modelopt.mean_bits(chosen) <= bits
    by_budget = np.argsort(-np.mean(KNOWN[0.1], axis=1), kind="stable")
    spent = [modelopt.BITS[chosen[layer]] for layer in by_budget]
    assert spent == sorted(spent, reverse=True), "a layer with a smaller budget has more bits"


def test_what_modelopt_writes_is_written(tmp_path: Path) -> None:
    content = json.loads(Path(exported(tmp_path, "modelopt", "bits=6")).read_text())
    assert content["producer"]["name"] == "learnkv"
    part = content["quantization"]
    assert part["kv_cache_quant_algo"] == "MIXED_PRECISION"
    assert part["kv_cache_schema_version"] == 1
    assert part["kv_cache_quantized_layers"]["model.layers.0.self_attn"].keys() == {"quant_algo"}
    alike = json.loads(Path(exported(tmp_path, "modelopt", "bits=8")).read_text())["quantization"]
    assert alike["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize(("precision", "kind"), [(8, "FP8"), ({"keys": 8, "values": 4}, "FP8_K_NVFP4_V"), (4, "NVFP4")])
def test_a_policys_own_precision_is_exported(precision: object, kind: str, tmp_path: Path) -> None:
    policy = Policy(SnapKV(), LearnedAllocator(Uniform(), 6, 4), precision=precision)
    folder = save_policy(policy, tmp_path / "policy", model=describe_model(empty_model("reference")))
    assert export([f"ckpt={folder}", f"out={tmp_path / 'out.json'}", "format=modelopt", "model=reference"]) == 0
    assert set(modelopt.read(tmp_path / "out.json").values()) == {kind}


def test_bits_that_modelopt_does_not_have_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = Policy(SnapKV(), LearnedAllocator(Uniform(), 6, 4), precision=3)
    folder = save_policy(policy, tmp_path / "policy", model=describe_model(empty_model("reference")))
    for words, cause in (
        ([f"ckpt={folder}", "format=modelopt"], "precision=3: ModelOpt's layers have one format, expected 8, K8V4, 4"),
        (["ckpt=reference", "format=modelopt", "bits=3"], "bits=3: expected 4.5 (NVFP4) to 8 (FP8)"),
        (["ckpt=reference", "format=modelopt", "model=nowhere/x/y"], "model=nowhere/x/y"),
        (["ckpt=reference", "format=duo", "model=reference"], "model=reference: belongs to format=modelopt"),
        (["ckpt=reference", "format=duo", "tokens=9"], "tokens=9: belongs to format=layers"),
        (["ckpt=reference", "format=layers", "page=0"], "tokens=0 page=0: expected tokens >= 0 and page >= 1"),
    ):
        assert export([*words, f"out={tmp_path}/out"]) == 2
        assert cause in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("[]", "expected quantization.kv_cache_quantized_layers"),
        (
            '{"quantization": {"kv_cache_quantized_layers": {"a": {"quant_algo": "FP8"}}}}',
            "kv_cache_schema_version None",
        ),
        (
            '{"quantization": {"kv_cache_schema_version": 1, '
            '"kv_cache_quantized_layers": {"a": {"quant_algo": "INT2"}}}}',
            "a has INT2, expected one of NVFP4",
        ),
    ],
)
def test_another_map_of_layers_is_refused(content: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=cause):
        modelopt.read(tmp_path / "x.json")


def test_layers_of_a_hybrid_model_are_those_that_are_compressed(tmp_path: Path) -> None:
    model = build("gemma3")
    model.config.save_pretrained(tmp_path)
    described = describe_model(model)
    names = attention_layers(str(tmp_path), described["config_hash"])
    assert names == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    with pytest.raises(UserError, match="trained for a model of other sizes"):
        attention_layers("reference", described["config_hash"])
