"""`learnkv COMMAND`: usage, mistyped commands, missing extras, exit codes."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from learnkv.cli import main as module
from learnkv.cli.main import COMMANDS, main
from learnkv.errors import Preempted, RunError, UserError
from learnkv.evaluation.config import EvalConfig


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_usage_lists_every_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    usage = capsys.readouterr().out
    assert usage.startswith("usage: learnkv COMMAND [config=NAME] [key=value …]")
    assert all(f"  {name}" in usage and command.about in usage for name, command in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: learnkv {name} [--config")


def test_no_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert error_of(capsys) == "error: no command: expected one of {}".format(", ".join(COMMANDS))


@pytest.mark.parametrize(("word", "end"), [("evla", "; did you mean eval?"), ("xyz", "compress, ask, fetch")])
def test_an_unknown_command_is_answered_with_the_nearest(
    word: Any, end: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "samples=3"]) == 2
    line = error_of(capsys)
    assert line.startswith(f"error: {word}: expected one of train, eval, calibrate")
    assert line.endswith(end)


def test_modules_of_the_current_folder_come_after_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    main(["eval", "samples=0"])
    main(["eval", "samples=0"])
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(("name", "extra"), [("train", "train"), ("memory", "train"), ("eval", "eval")])
def test_a_missing_dependency_is_one_line_with_the_extra(
    name: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: str) -> None:
        raise ModuleNotFoundError("No module named 'lightning.pytorch'", name="lightning.pytorch")

    monkeypatch.setattr(module, "import_module", missing)
    assert main([name, "config=quickstart"]) == 2
    install = f"pip install 'learnkv[{extra}]'"
    assert error_of(capsys) == f"error: learnkv {name} needs lightning, which is not installed: {install}"


def test_a_missing_module_of_the_package_itself_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise ModuleNotFoundError(f"No module named {path!r}", name=path)

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["train", "config=quickstart"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, None),
        (UserError("keep=2: expected\nless"), 2, "error: keep=2: expected less"),
        (RunError("NaN"), 1, "error: NaN"),
        (Preempted("stopped at step 3"), 143, "error: stopped at step 3"),
        (OSError(28, "No space left on device", "runs/x"), 1, "error: no space left on disk for runs/x"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    line: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def evaluate(config: EvalConfig, resolved: str) -> None:
        assert config.samples == 3
        if error is not None:
            raise error

    monkeypatch.setattr(importlib.import_module("learnkv.evaluation.run"), "evaluate", evaluate)
    assert main(["eval", "samples=3"]) == code
    assert (error_of(capsys) if line else None) == line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(config: EvalConfig, resolved: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module("learnkv.evaluation.run"), "evaluate", evaluate)
    with pytest.raises(ZeroDivisionError):
        main(["eval", "samples=3"])


def test_an_empty_command_line_has_a_default_where_one_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export"]) == 2
    assert error_of(capsys) == "error: ckpt=: expected a path, got nothing"
    assert main(["eval"]) == 2
    assert "no arguments: expected config=NAME|PATH or key=value; names: " in error_of(capsys)


def test_python_m_learnkv_is_the_console_command() -> None:
    done = subprocess.run([sys.executable, "-m", "learnkv", "evla"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("did you mean eval?")
