"""Policies that go to the hub and come from it: on folders laid out as it is, without a network."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi
from support.commands import export
from support.models import attached, kept, policy_for, tokens

from learnkv import load_policy, prefill, save_policy
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.run import load_policies
from learnkv.inference.models import describe_model
from learnkv.persistence.hub import FILES, is_repository
from learnkv.persistence.policies import describe_policy_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is a folder: what is sent to it lies where fetched repositories lie, at the branch `main`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    made = []

    def repository(repo_id: str) -> Path:
        return tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"

    def create_repo(self: Any, repo_id: str, *, exist_ok: bool = False, **kwargs: Any) -> None:
        if not repo_id.startswith("me/"):
            raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nand more")
        assert exist_ok
        made.append(repo_id)

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **kwargs: str) -> None:
        assert repo_id in made
        files = [path for path in sorted(Path(folder_path).rglob("*")) if path.is_file()]
        names = [path.relative_to(folder_path).as_posix() for path in files]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            target = repository(repo_id) / "snapshots" / COMMIT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(folder_path) / name, target)
        (repository(repo_id) / "refs").mkdir(exist_ok=True)
        (repository(repo_id) / "refs" / "main").write_text(COMMIT)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported policy, beside it files that are nobody's business."""
    made = policy_for("conditioned", attached("llama"))
    told = {"val/learned_kl@0.1": 0.123456, "train/kl": 0.5}
    description = {**describe_model(attached("llama")), "id": "someone/tiny"}
    budgets = {0.1: [[0.05, 0.15], [0.1, 0.1], [0.2, 0.0]], 0.5: [[0.5, 0.5]] * 3}
    where = save_policy(made, tmp_path / "run" / "policy", model=description, budgets=budgets, metrics=told)
    (where / "notes.txt").write_text("private")
    (where / "modeling.py").write_text("raise SystemExit('code was run')")
    return where


def test_a_policy_comes_back_from_the_hub(hub: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export([f"ckpt={folder}", "push=me/tiny-policy"]) == 0
    assert "pushed: me/tiny-policy" in capsys.readouterr().err
    sent = [path for path in hub.rglob("*") if path.is_file() and "snapshots" in path.parts]
    assert {path.name for path in sent} == {
        "README.md",
        "budgets.csv",
        "manifest.json",
        "policy.safetensors",
        "policy.yaml",
        "generate.py",
        "requirements.txt",
    }
    model = attached("llama")
    whole = prefill(model, tokens(1, 90))
    ours = kept(load_policy(folder).compress(whole.fork(), keep=0.3), 0)
    for name in ("me/tiny-policy", "me/tiny-policy@main"):
        config = EvalConfig(ckpt=(name,), tasks=("niah_single_1",))
        ((called, loaded),) = load_policies(config, model).items()
        assert called == "learned-tiny-policy"
        assert kept(loaded.compress(whole.fork(), keep=0.3), 0) == ours
    snapshot = next(path for path in hub.rglob(COMMIT))
    assert kept(load_policy(snapshot).compress(whole.fork(), keep=0.3), 0) == ours


def test_a_run_and_its_adapter_are_sent(hub: Path, folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "optimizer.pt").write_text("")
    assert export([f"ckpt={folder.parent}", "push=me/run"]) == 0
    names = {path.name for path in (hub / "models--me--run" / "snapshots" / COMMIT).rglob("*") if path.is_file()}
    assert "adapter_config.json" in names
    assert not names & {"optimizer.pt", "notes.txt", "modeling.py"}


def test_a_checkpoint_is_exported_and_sent(hub: Path, tmp_path: Path) -> None:
    made = policy_for("tokens", attached("llama"))
    ours = {"format_version": 1, "policy": made.spec(), "model": describe_model(attached("llama"))}
    state = {f"policy.{name}": held for name, held in made.state_dict().items()}
    torch.save({"learnkv": ours, "state_dict": state}, tmp_path / "last.ckpt")
    assert export([f"ckpt={tmp_path / 'last.ckpt'}", f"out={tmp_path / 'out'}", "push=me/learned-x"]) == 0
    assert load_policy("me/learned-x").spec() == made.spec()
    assert describe_policy_file("me/learned-x") == "learned-x"
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {*FILES, "custom_generate"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ckpt=me/nothing", "push=me/x"], "ckpt=me/nothing: no such file or folder, and the hub has no such policy"),
        (["ckpt=reference", "push=other/x"], "push=other/x: Token is required"),
        (["ckpt=reference", "push=me/x", "format=duo"], "push=me/x: sends the folder of a policy"),
        (["ckpt=reference", "push=me/x", "out=there"], "push=me/x: sends the folder of a policy"),
        (["ckpt=snapkv", "push=me/x"], "ckpt=snapkv: expected a trained policy"),
        (["ckpt=last.ckpt", "push=me/x"], "out=: expected a path"),
    ],
)
def test_what_cannot_be_sent_or_fetched_is_told_in_a_line(
    hub: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(words) == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1


def test_a_repository_of_something_else_is_told(hub: Path) -> None:
    other = hub / "models--me--other"
    (other / "snapshots" / COMMIT).mkdir(parents=True)
    (other / "refs").mkdir()
    (other / "refs" / "main").write_text(COMMIT)
    with pytest.raises(UserError, match="ckpt=me/other: expected the repository of an exported policy"):
        load_policy("me/other")


def test_no_network_is_asked_about_a_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_repository("someone/policy")
    assert is_repository("someone/policy-1.5@v2")
    for path in ("runs/mine", "someone/last.ckpt", "someone/snapkv.yaml", "snapkv", "a/b/c", "/a/b", "./a/b", "../b"):
        assert not is_repository(path), path
    with pytest.raises(UserError, match="ckpt=runs/mine: expected a checkpoint, an exported folder, reference"):
        load_policy("runs/mine")


def test_the_card_says_what_was_measured(folder: Path) -> None:
    head, page = (folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head)["base_model"] == "someone/tiny"
    for line in (
        "# KV-cache policy for someone/tiny",
        "- scores: SnapKV",
        "- budgets: LearnedAllocator on Uniform",
        "- always kept: the first 4 and the last 8 tokens, within the budget",
        "| layer | 10 % | 50 % |",
        "| 0 | 10.0 | 50.0 |",
        "| 2 | 10.0 | 50.0 |",
        "| train/kl | 0.5 |",
        "| val/learned_kl@0.1 | 0.1235 |",
    ):
        assert line in page.split("\n"), line
    assert "mean over the validation prompts" in page


def test_the_card_of_a_model_on_this_disk_names_no_path_and_no_figures(tmp_path: Path) -> None:
    description = {**describe_model(attached("llama")), "id": "/home/someone/llama"}
    save_policy(policy_for("tokens", attached("llama")), tmp_path, model=description)
    page = (tmp_path / "README.md").read_text()
    assert "/home" not in page
    assert "base_model" not in page
    assert "# KV-cache policy for llama" in page
    assert "the same for every prompt" in page
    assert "Nothing was measured" in page
