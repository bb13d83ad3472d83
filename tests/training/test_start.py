"""`start=`: training begins with the weights of a trained policy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import train
from support.training import assert_same, weights
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from learnkv.cli.parser import parse
from learnkv.persistence.named_configs import CONFIGS
from learnkv.persistence.policies import SHIPPED, build_policy, fill_sizes, load_policy
from learnkv.training.config import TrainConfig
from learnkv.training.data.batches import Batch
from learnkv.training.module import Distillation
from learnkv.training.start import take_weights

ALLOCATOR = "policy.init_args.allocator.init_args"
SCORER = "policy.init_args.scorer.init_args"
LORA = ["lora.rank=2", "lora.targets=q_proj,o_proj", "lora.lr=0.01"]


@pytest.fixture
def short(words: list[str]) -> list[str]:
    """What is typed for two steps at rates that move every weight."""
    replaced = ("trainer.max_steps", "output", "validation_batches")
    kept = [word for word in words if not word.startswith(replaced)]
    return [*kept, "trainer.max_steps=2", "lr=0.05", "budget_lr=0.05", "validation_batches=1"]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Weights of every training before its first step, those of its adapter too."""
    found: list[dict[str, Tensor]] = []

    def note(self: Distillation) -> None:
        named = [*self.policy.named_parameters(), *enumerate(self.adapted)]
        found.append({str(name): weight.detach().clone() for name, weight in named})

    monkeypatch.setattr(Distillation, "on_train_start", note, raising=False)
    return found


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line about the start of a run."""
    (only,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("start="))
    return only


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of a refused run."""
    lines = capsys.readouterr().err.splitlines()
    said = [one for one in lines if one and not one.startswith("Loading weights")]  # a bar of transformers
    assert len(said) == 1
    assert said[0].startswith("error: ")
    return said[0]


def test_training_begins_with_the_weights_of_a_run_an_export_or_a_checkpoint(
    short: list[str],
    begun: list[dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train([*short, "output=first"]) == 0
    trained = weights(tmp_path / "first")
    assert any(not torch.equal(begun[0][name], weight) for name, weight in trained.items())
    for number, start in enumerate(("first", "first/policy", "first/checkpoints/last.ckpt")):
        capsys.readouterr()
        assert train([*short, "seed=7", f"start={start}", f"output=run{number}"]) == 0
        assert_same(begun[-1], trained)
        assert (
            line(capsys)
            == f"start={start}: takes {', '.join(sorted(trained))}; begins anew: nothing; not used: nothing"
        )
    manifest = json.loads((tmp_path / "run0/policy/manifest.json").read_text())
    assert manifest["training"]["start"] == "first"
    assert str(tmp_path) not in str(manifest["training"]["start"])
    stored = torch.load("run0/checkpoints/last.ckpt", weights_only=True)["learnkv"]["contents"]["start"]
    assert len(stored) == 64
    assert stored == torch.load("run1/checkpoints/last.ckpt", weights_only=True)["learnkv"]["contents"]["start"]


def test_parts_that_the_start_lacks_begin_as_without_it(
    short: list[str], begun: list[dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "first"
    assert train([*short, f"{ALLOCATOR}.layers=false", f"{ALLOCATOR}.conditioned=false", f"output={start}"]) == 0
    assert train([*short, f"output={tmp_path / 'plain'}"]) == 0
    capsys.readouterr()
    assert train([*short, f"start={start}", f"{ALLOCATOR}.heads=false", f"output={tmp_path / 'run'}"]) == 0
    told = line(capsys)
    (_, plain, now), trained = begun, weights(start)
    common = now.keys() & trained.keys()
    assert common == {name for name in now if name.startswith("scorer.")}
    assert_same({name: now[name] for name in common}, {name: trained[name] for name in common})
    anew = sorted(now.keys() - common)
    assert "allocator.layer_budget.logits" in anew
    assert "allocator.layer_budget.conditioner.out.weight" in anew
    zero = [name for name in anew if name.endswith(("logits", "out.weight"))]
    assert_same({name: now[name] for name in zero}, {name: plain[name] for name in zero})
    assert f"begins anew: {', '.join(anew)}; not used: allocator.head_importance.logits" in told


def test_an_adapter_is_taken_or_begins_anew_and_another_one_is_refused(
    short: list[str], begun: list[dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, run = tmp_path / "first", f"output={tmp_path / 'run'}"
    assert train([*short, *LORA, f"output={start}"]) == 0
    trained = load_policy(start).adapter
    assert trained is not None
    capsys.readouterr()
    assert train([*short, *LORA, f"start={start}", run]) == 0
    assert "takes allocator" in (told := line(capsys))
    assert "adapter; begins anew: nothing" in told
    loras = [weight for name, weight in begun[1].items() if name.isdigit()]
    assert any(bool(weight.any()) for name, weight in trained.state.items() if ".lora_B." in name)
    assert len(loras) == len(trained.state)
    assert sum(float(weight.double().sum()) for weight in loras) == pytest.approx(
        sum(float(weight.double().sum()) for weight in trained.state.values()), abs=1e-12
    )
    for typed, own in (([], "the policy has none"), (["lora.rank=3"], "rank 3"), (["lora.alpha=5"], "alpha 5")):
        other = [*LORA, *typed] if typed else []
        assert train([*short, *other, f"start={start}", f"output={tmp_path / 'other'}"]) == 2
        told = refusal(capsys)
        assert "has a LoRA adapter of rank 2" in told
        assert own in told
    assert train([*short, f"output={tmp_path / 'plain'}"]) == 0
    capsys.readouterr()
    assert train([*short, *LORA, f"start={tmp_path / 'plain'}", f"output={tmp_path / 'beside'}"]) == 0
    assert "begins anew: adapter; not used: nothing" in line(capsys)


def test_a_start_that_does_not_fit_is_one_line(
    short: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "first"
    assert train([*short, f"output={start}"]) == 0
    capsys.readouterr()
    other, base = tmp_path / "other", tmp_path / "base"
    config = LlamaConfig.from_pretrained(folder)
    for path, heads in ((other, 4), (base, 2)):
        config.num_key_value_heads = heads
        LlamaForCausalLM(config).save_pretrained(path)
        for file in folder.glob("tokenizer*"):
            (path / file.name).write_bytes(file.read_bytes())
    capsys.readouterr()
    broken = tmp_path / "broken"
    broken.mkdir()
    uniform = "{class_path: learnkv.allocators.Uniform}"
    gate = "{class_path: learnkv.scorers.GateScorer, init_args: {base: {class_path: learnkv.scorers.SnapKV}}}"
    cases: dict[str, tuple[list[str], str]] = {
        "snapkv": ([], "start=snapkv: expected a trained policy: a checkpoint, the folder of a run"),
        "/no/such/run": ([], "start=/no/such/run: expected a trained policy"),
        "/no/such.ckpt": ([], "start=/no/such.ckpt: expected a trained policy"),
        str(broken): ([], f"start={broken}: expected a trained policy, its folder has no policy.yaml"),
        "reference": ([], "start=reference: trained for reference (hash"),
        str(start): (
            [f"{SCORER}.width=5"],
            "weight scorer.bias has shape (2, 2, 1, 4), the policy expects (2, 2, 1, 5)",
        ),
        f"{start}/policy": (
            [f"policy.init_args.allocator={uniform}", f"policy.init_args.scorer={gate}"],
            "has no weight in common",
        ),
        f"{start}/checkpoints/last.ckpt": ([f"model={other}"], f"start={start}/checkpoints/last.ckpt: trained for"),
        f"{start}/": ([f"model={base}"], f"start={start}/: trained for the weights "),
    }
    for typed, (more, told) in cases.items():
        assert train([*short, *more, f"start={typed}", f"output={tmp_path / 'run'}"]) == 2, typed
        assert told in refusal(capsys)
    inside = [*short, f"start={start}/checkpoints/last.ckpt", f"output={start}", "overwrite=true"]
    assert train(inside) == 2
    assert f"lies in output={start}" in refusal(capsys)
    assert (start / "checkpoints" / "last.ckpt").is_file()


def test_a_resumed_run_goes_on_with_its_own_weights(
    short: list[str],
    begun: list[dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train([*short, f"output={first}"]) == 0
    assert train([*short, "seed=1", f"output={second}"]) == 0
    assert train([*short, f"start={first}", f"output={tmp_path / 'whole'}"]) == 0
    step = Distillation.training_step

    def until_it_breaks(self: Any, batch: Batch, batch_idx: int) -> Tensor:
        if self.global_step == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    cut = [*short, "save_every=1", f"start={first}", f"output={tmp_path / 'cut'}"]
    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "training_step", until_it_breaks)
        assert train(cut) == 130
    capsys.readouterr()
    for other in (f"start={second}", "start=null"):
        assert train([*cut, other]) == 2
        assert "has a run with another start" in refusal(capsys)
    moved = first.rename(tmp_path / "moved")
    assert train(cut) == 2
    assert f"start={first}: expected a trained policy" in refusal(capsys)
    assert train([*cut, f"start={moved}"]) == 0
    assert "start=" not in capsys.readouterr().err
    assert any(not torch.equal(begun[-1][name], weight) for name, weight in weights(moved).items())
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "train/study/smollm2").glob("*.yaml")))
def test_every_variant_of_smollm2_begins_with_what_it_has_of_the_shipped_policy(name: str) -> None:
    config, _ = parse(TrainConfig, [f"config=study/smollm2/{name}"], "train")
    described = json.loads((SHIPPED["smollm2"] / "manifest.json").read_text())["model"]
    assert config.policy is not None
    steps = 180 if name == "learned-bytes" else 120
    assert (config.model, config.start, config.trainer["max_steps"]) == ("smollm2", "smollm2", steps)
    assert not config.distillation.objective.at_step(0).targets  # no regression: the scores are regressed already
    policy = build_policy(fill_sizes(config.policy.spec(), described["shapes"]))
    told = take_weights(config.start, policy, torch.nn.Module(), described, ())
    own, shipped = policy.state_dict(), load_policy("smollm2").state_dict()
    common = own.keys() & shipped.keys()
    assert_same({key: own[key] for key in common}, {key: shipped[key] for key in common})
    anew = own.keys() - common
    assert bool(anew) == (name in ("learned-all", "learned-bytes", "learned-conditioned"))
    assert all(".conditioner." in key or key.startswith("precision.") for key in anew)
    whole = ("learned-all", "learned-both", "learned-bytes", "learned-conditioned")
    assert ("not used: nothing" in told) == (name in whole)


def test_no_two_variants_of_smollm2_are_one_policy() -> None:
    names = [path.stem for path in (CONFIGS / "train/study/smollm2").glob("*.yaml")]
    configs = [parse(TrainConfig, [f"config=study/smollm2/{name}"], "train")[0] for name in names]
    assert len(names) == 8
    assert len({json.dumps(config.policy.spec()) for config in configs if config.policy is not None}) == 8
    assert len({config.output for config in configs}) == 8
