"""The wheel carries all that the package needs: it works in a folder that has no checkout near it."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, cwd: Path, path: str) -> subprocess.CompletedProcess[str]:
    """Run this Python elsewhere, with ``path`` before everything that is installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    built, unpacked = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("unpacked")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built)]
    made = python("-m", "pip", "wheel", *options, str(ROOT), cwd=built, path="")
    assert made.returncode == 0, made.stderr
    (file,) = built.glob("learnkv-*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(unpacked)
    return unpacked


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_wheel_holds_the_package_and_the_configs_byte_for_byte(wheel: Path) -> None:
    package = contents(ROOT / "src" / "learnkv")
    configs = {f"configs/{name}": data for name, data in contents(ROOT / "configs").items()}
    assert {"py.typed", "reference/model/config.json", "reference/model/model.safetensors"} <= package.keys()
    assert {"configs/train/quickstart.yaml", "configs/policies/snapkv.yaml"} <= configs.keys()
    assert contents(wheel / "learnkv") == package | configs


def test_wheel_leaves_out_experiments_benchmarks_and_tests(wheel: Path) -> None:
    packages = {path.name for path in wheel.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")}
    assert packages == {"learnkv"}
    assert not {"experiments", "benchmarks", "tests", "study"} & {path.name for path in (wheel / "learnkv").iterdir()}


def test_wheel_declares_command_requirements_and_extras(wheel: Path) -> None:
    (metadata,) = wheel.glob("learnkv-*.dist-info/METADATA")
    fields = [line.partition(": ")[::2] for line in metadata.read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {value.split(";")[0] for name, value in fields if name == "Requires-Dist" and "extra ==" not in value}
    assert {re.split(r"[ \[<>=;]", one)[0] for one in required} == {
        re.split(r"[ \[<>=;]", one)[0] for one in project["dependencies"]
    }
    assert {value for name, value in fields if name == "Provides-Extra"} == set(project["optional-dependencies"])
    assert {value.partition(", ")[0] for name, value in fields if name == "Project-URL"} >= {"Repository", "Issues"}
    commands = (metadata.parent / "entry_points.txt").read_text(encoding="utf-8")
    assert "learnkv = learnkv.cli.main:main" in commands
    assert not (wheel / "experiments").exists()


def test_the_wheel_alone_is_imported_and_finds_bare_names_of_configs(wheel: Path, tmp_path: Path) -> None:
    """The complaints are about keep, not about a missing file."""
    code = """
import learnkv
from learnkv import attach, prefill, load_policy
from learnkv.cli.main import main
print(learnkv.__file__)
print(main(["train", "config=quickstart", "keep=1.5"]))
print(main(["eval", "config=quickstart", "--ckpt", "configs/policies/snapkv.yaml", "keep=1.5"]))
"""
    done = python("-c", code, cwd=tmp_path, path=str(wheel))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(wheel / "learnkv" / "__init__.py"), "2", "2"]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    assert all("keep" in line and "1.5" in line for line in lines)
