"""The package without extras: `make test-core` runs this in an environment that has nothing else.

In the environment of `make test` the extras are installed, and what needs their absence is skipped.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("lightning", "wandb", "datasets", "matplotlib", "peft", "wonderwords", "kvpress")
WITHOUT_EXTRAS = all(importlib.util.find_spec(name) is None for name in OPTIONAL)
alone = pytest.mark.skipif(not WITHOUT_EXTRAS, reason="extras are installed; make test-core runs it without them")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python in a folder that has no checkout near it."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


@alone
def test_the_package_is_the_installed_one(tmp_path: Path) -> None:
    done = python("-c", "import learnkv; print(learnkv.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout
    assert not Path(done.stdout.strip()).is_relative_to(ROOT / "src")


def test_the_readme_example_runs_without_extras(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = python("-c", example, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4817293" in done.stdout


def test_policies_are_loaded_without_extras(tmp_path: Path) -> None:
    """By name, with a table, with pages, trained, and from the folder of an exported one."""
    code = """
import shutil
from learnkv import load_policy
from learnkv.persistence.policies import policy_folder
shutil.copytree(policy_folder("reference"), "exported")
for name in ("snapkv", "headkv", "quest", "reference", "exported"):
    print(type(load_policy(name)).__name__)
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Policy"] * 5


@alone
@pytest.mark.parametrize(
    ("command", "words", "extra"),
    [
        ("train", ["config=quickstart"], "train"),
        ("memory", ["config=quickstart"], "train"),
        ("eval", ["config=quickstart"], "eval"),
        ("calibrate", ["out=tables"], "eval"),
    ],
)
def test_a_command_says_in_one_line_what_to_install(tmp_path: Path, command: str, words: list[str], extra: str) -> None:
    done = python("-m", "learnkv", command, *words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    *loading, line = done.stderr.strip().splitlines()  # calibrate loads its model first
    assert all(earlier.startswith("Loading weights") for earlier in loading)
    assert f"pip install 'learnkv[{extra}]'" in line
    assert f"learnkv {command}" in line


@alone
def test_train_py_says_it_too(tmp_path: Path) -> None:
    done = python(str(ROOT / "train.py"), "config=quickstart", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "pip install 'learnkv[train]'" in line


@alone
def test_budgets_are_exported_without_extras(tmp_path: Path) -> None:
    words = ["ckpt=reference", "format=layers", "out=layers.json"]
    done = python("-m", "learnkv", "export", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "layers.json").is_file()
