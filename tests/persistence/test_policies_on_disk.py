"""Policies on disk: what comes back is what was written, and nothing foreign, broken or dangerous comes in."""

import csv
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.models import HEURISTICS, LEARNED, attached, kept, padded, policy_for, tokens

from learnkv import Policy, load_policy, prefill, save_policy
from learnkv.allocators import AdaKV, LearnedAllocator, Pyramid, Uniform
from learnkv.errors import UserError
from learnkv.inference.models import describe_model
from learnkv.persistence.policies import GRID, build_policy, describe_policy_file
from learnkv.scorers import SnapKV

MEASURED = {keep: [[keep] * 2] * 3 for keep in GRID}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Policy]:
    """A learned policy's folder and the policy."""
    model = attached("llama")
    policy = policy_for("tokens", model)
    folder = tmp_path_factory.mktemp("run") / "policy"
    save_policy(policy, folder, model=describe_model(model), training={"steps": 3}, metrics={"kl": 0.25})
    return folder, policy


@pytest.fixture
def folder(exported: tuple[Path, Policy], tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(exported[0], tmp_path / "policy")


def checkpoint(policy: Policy, file: Path, **changes: Any) -> Path:
    """What train.py writes, as far as policies are concerned."""
    ours = {"format_version": 1, "policy": policy.spec(), "model": describe_model(attached("llama"))}
    state = {f"policy.{name}": held for name, held in policy.state_dict().items()}
    torch.save({"learnkv": ours, "state_dict": {**state, "other.weight": torch.zeros(1)}, **changes}, file)
    return file


def same_choices(one: Policy, other: Policy) -> None:
    prompts = padded([tokens(1, 90)[0], tokens(1, 61)[0]])
    whole = prefill(attached("llama"), *prompts, policies=[one, other])
    for keep in (0.05, 0.1, 0.33, 0.6):
        first, second = (policy.compress(whole.fork(), keep=keep) for policy in (one, other))
        assert [kept(first, row) for row in (0, 1)] == [kept(second, row) for row in (0, 1)]


@pytest.mark.parametrize("name", HEURISTICS + LEARNED)
def test_an_exported_policy_and_a_checkpoint_keep_the_same_entries(name: str, tmp_path: Path) -> None:
    model, policy = attached("llama"), policy_for(name, attached("llama"))
    measured = None if policy.allocator.static else MEASURED
    back = load_policy(save_policy(policy, tmp_path / "new" / "policy", model=describe_model(model), budgets=measured))
    trained = load_policy(checkpoint(policy, tmp_path / "last.ckpt"), model=describe_model(model))
    for loaded in (back, trained, load_policy(tmp_path / "new")):
        assert loaded.spec() == policy.spec()
        assert not loaded.training
        assert not any(held.requires_grad for held in loaded.parameters())
        assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
            k: v.tolist() for k, v in policy.state_dict().items()
        }
        same_choices(loaded, policy)


def test_the_folder_is_what_a_person_can_read(exported: tuple[Path, Policy]) -> None:
    folder, policy = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "budgets.csv",
        "custom_generate",
        "manifest.json",
        "policy.safetensors",
        "policy.yaml",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["model"] == describe_model(attached("llama"))
    assert (manifest["training"], manifest["metrics"]) == ({"steps": 3}, {"kl": 0.25})
    spec = yaml.safe_load((folder / "policy.yaml").read_text())
    assert spec["scorer"]["class_path"] == "learnkv.scorers.LearnedScorer"
    assert spec["scorer"]["init_args"]["base"]["init_args"]["window"] == 16
    assert set(load_file(folder / "policy.safetensors")) == set(policy.state_dict())


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "budgets.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "tokens", "onehead"])
def test_the_budget_table_is_what_a_prompt_gets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learnkv.persistence.policies._NOMINAL_ENTRIES", 500)
    model = attached("llama")
    if name == "onehead":
        policy = Policy(SnapKV(), LearnedAllocator(Uniform(), 3, 2))
        policy.allocator.head_importance.logits.data[:, 1, 1] = 40
        policy.allocator.layer_budget.logits.data[:, 1] = 40
        policy.requires_grad_(False)
    else:
        policy = policy_for(name, model)
    save_policy(policy, tmp_path, model=describe_model(model))
    rows = table(tmp_path)
    assert [(row["layer"], row["head"]) for row in rows] == [(str(at // 2), str(at % 2)) for at in range(6)]
    whole = prefill(model, tokens(1, 500))
    for keep in GRID:
        told = torch.tensor([float(row[f"keep_{keep:g}"]) for row in rows])
        got = policy.compress(whole.fork(), keep=keep).budgets[:, 0].flatten() / 500
        torch.testing.assert_close(told, got, rtol=0, atol=1e-6)


def test_measured_budgets_are_written_as_measured_and_asked_for(tmp_path: Path) -> None:
    policy, model = Policy(SnapKV(), AdaKV(Pyramid())), describe_model(attached("llama"))
    with pytest.raises(UserError, match="budgets depend on the prompt"):
        save_policy(policy, tmp_path, model=model)
    save_policy(policy, tmp_path, model=model, budgets={0.5: [[0.1, 0.9], [0.4, 0.6], [0.25, 0.75]]})
    assert [row["keep_0.5"] for row in table(tmp_path)] == [f"{x:.6f}" for x in (0.1, 0.9, 0.4, 0.6, 0.25, 0.75)]


def test_a_policy_of_another_model_is_refused_with_hash_and_shapes(
    exported: tuple[Path, Policy], tmp_path: Path
) -> None:
    folder, policy = exported
    other = describe_model(attached("qwen2"))
    for path in (folder, checkpoint(policy, tmp_path / "last.ckpt")):
        with pytest.raises(UserError) as caught:
            load_policy(path, model=other)
        line = str(caught.value)
        assert line.startswith(f"ckpt={path}: trained for ")
        for one in (other, describe_model(attached("llama"))):
            assert one["config_hash"][:12] in line
            assert ", ".join(f"{name} {size}" for name, size in one["shapes"].items()) in line
        assert "\n" not in line
    assert load_policy("snapkv", model=other).scorer is not None


def breaks(name: str, content: bytes | str) -> Callable[..., Any]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit(name: str, **changes: Any) -> Callable[..., Any]:
    def change(folder: Path) -> None:
        loaded = yaml.safe_load((folder / name).read_text())
        (folder / name).write_text(json.dumps({**loaded, **changes}))

    return change


def cut_weights(folder: Path) -> None:
    whole = (folder / "policy.safetensors").read_bytes()
    (folder / "policy.safetensors").write_bytes(whole[: len(whole) // 2])


def other_weights(folder: Path) -> None:
    state = load_file(folder / "policy.safetensors")
    save_file({name: held[..., :1].contiguous() for name, held in state.items()}, folder / "policy.safetensors")


BREAKS = {
    "cut weights": (cut_weights, "cannot be read: "),
    "no weights": (breaks("policy.safetensors", b""), "cannot be read: "),
    "random weights": (breaks("policy.safetensors", b"\xff" * 200), "cannot be read: "),
    "weights of another shape": (other_weights, "weight .* has shape .*, the policy expects "),
    "missing weights": (lambda folder: (folder / "policy.safetensors").unlink(), "policy.safetensors is missing"),
    "missing manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest is no json": (breaks("manifest.json", "{"), "cannot be read: "),
    "manifest is a list": (breaks("manifest.json", "[]"), "cannot be read: "),
    "manifest without a model": (edit("manifest.json", model=3), "cannot be read: "),
    "newer version": (edit("manifest.json", format_version=2), "format version 2, expected 1"),
    "policy is no yaml": (breaks("policy.yaml", "scorer: ["), "policy.yaml: "),
    "policy is a list": (breaks("policy.yaml", "- a"), "expected a mapping of the policy's arguments, got list"),
    "policy is binary": (breaks("policy.yaml", b"\xff\xfe\x00"), "policy.yaml: "),
    "unknown argument": (edit("policy.yaml", sink=3), "sink"),
    "wrong type": (edit("policy.yaml", sinks="many"), "sinks"),
    "value out of range": (edit("policy.yaml", sinks=-1), "sinks=-1 recent=8: expected numbers of tokens >= 0"),
    "foreign class": (
        edit("policy.yaml", scorer={"class_path": "os.system", "init_args": {"command": "true"}}),
        "allow=os",
    ),
    "unknown class": (edit("policy.yaml", scorer={"class_path": "learnkv.scorers.Nothing"}), "Nothing"),
    "not a scorer": (edit("policy.yaml", scorer={"class_path": "learnkv.allocators.Uniform"}), "Uniform"),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_broken_folders_are_refused_in_one_line(folder: Path, fault: str) -> None:
    change, line = BREAKS[fault]
    change(folder)
    with pytest.raises(UserError, match=line) as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_checkpoint_never_runs_code(exported: tuple[Path, Policy], tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    poisoned = checkpoint(exported[1], tmp_path / "last.ckpt", callbacks=Trap(sprung))
    with pytest.raises(UserError, match=r"last.ckpt: not a checkpoint of learnkv's train.py") as caught:
        load_policy(poisoned)
    assert "\n" not in str(caught.value)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    with pytest.raises(UserError, match=r"raw.ckpt: not a checkpoint"):
        load_policy(tmp_path / "raw.ckpt")
    assert not sprung.exists()
    torch.load(poisoned, weights_only=False)
    assert sprung.exists()  # the trap does spring


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"garbage" * 100,
        {"learnkv": 3, "state_dict": {}},
        {"state_dict": {}},
        [1, 2],
        {"learnkv": {}},
    ],
)
def test_files_that_are_not_checkpoints(content: bytes | dict[str, dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=r"x.ckpt: ") as caught:
        load_policy(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"ckpt=.*none.ckpt: no such file"):
        load_policy(tmp_path / "none.ckpt")


def test_classes_from_elsewhere_have_to_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from learnkv.scorers import Scorer\n\n\nclass Mine(Scorer):\n    def forward(self, obs):\n"
        "        return obs.positions.float()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = {"scorer": {"class_path": "mine.Mine"}}
    with pytest.raises(UserError, match=r"names the class mine\.Mine; .* unless allow=mine"):
        build_policy(spec)
    policy = build_policy(spec, allow=["mine"])
    assert type(policy.scorer).__name__ == "Mine"
    with pytest.raises(UserError, match=r"^allow='mine': expected a list of modules, such as \['mine'\]$"):
        build_policy(spec, allow="mine")  # its letters would be modules
    with pytest.raises(UserError, match="learnkvx"):
        build_policy({"scorer": {"class_path": "learnkvx.Mine"}})
    nested = {
        "scorer": None,
        "allocator": {"class_path": "learnkv.allocators.AdaKV", "init_args": {"base": spec["scorer"]}},
    }
    with pytest.raises(UserError, match="allow=mine"):
        build_policy(nested)


def test_names_in_tables(tmp_path: Path) -> None:
    for path, name in {
        "snapkv": "snapkv",
        "configs/policies/adakv.yaml": "adakv",
        "reference": "learned",
        tmp_path / "fast" / "checkpoints" / "last.ckpt": "learned-fast",
    }.items():
        assert describe_policy_file(path) == name
    (tmp_path / "fast" / "policy").mkdir(parents=True)
    assert (
        describe_policy_file(tmp_path / "fast" / "policy") == describe_policy_file(tmp_path / "fast") == "learned-fast"
    )


def test_a_learned_policy_without_weights_has_to_be_trained(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "scorer: {class_path: learnkv.scorers.HiddenScorer, init_args: {base: {class_path: learnkv.scorers.Constant}}}"
    )
    with pytest.raises(UserError, match=r"mine.yaml: has learned components without weights: train it with train.py"):
        load_policy(file)
