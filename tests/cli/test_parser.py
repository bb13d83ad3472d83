"""The command line: what is typed becomes a frozen dataclass, and what does not fit becomes one line."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from learnkv.cli.export import ExportConfig
from learnkv.cli.parser import parse, run_main
from learnkv.errors import RunError, UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.persistence import named_configs
from learnkv.persistence.named_configs import find_config
from learnkv.training.config import TrainConfig


class Loop:
    """Stands for a class of somebody else whose arguments are keys of ours."""

    def __init__(self, max_steps: int = -1, accelerator: str = "auto") -> None:
        raise AssertionError("its arguments are checked, but nothing is built")


@dataclass(frozen=True)
class Log:
    mode: Literal["offline", "online"] = "offline"
    at_steps: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Run:
    ckpt: tuple[str, ...] = ()
    keep: tuple[float, ...] = (0.5,)
    budget: tuple[int, ...] | None = None
    setting: tuple[Literal["agnostic", "aware"], ...] = ("agnostic",)
    samples: int = 10
    bounds: tuple[int, int] | None = None
    rate: float = 0.001
    model: str = "reference"
    log: Log | None = field(default_factory=Log)
    loop: dict[str, Any] = field(default_factory=dict, metadata={"arguments_of": Loop})

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: expected at least 1")


@pytest.fixture(autouse=True)
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "configs" / "eval"
    folder.mkdir(parents=True)
    (folder / "quickstart.yaml").write_text("samples: 3\nkeep: [0.25, 0.1]\nlog: {mode: online}\n")
    monkeypatch.setattr(named_configs, "CONFIGS", tmp_path / "configs")
    return folder


def parsed(*words: str) -> Run:
    return parse(Run, words, "eval")[0]


def complaint(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert "\n" not in " ".join(str(caught.value).split())
    return str(caught.value)


@pytest.mark.parametrize("words", [["keep=0.5,0.25"], ["--keep=0.5,0.25"], ["--keep", "0.5", "0.25"]])
def test_a_list_is_written_with_commas_or_spaces(words: list[str]) -> None:
    assert parsed(*words, "samples=7") == Run(keep=(0.5, 0.25), samples=7, loop=parsed().loop)


def test_policies_add_up_and_other_repeated_keys_replace() -> None:
    run = parsed("--ckpt", "a", "b", "ckpt=c,d", "--ckpt", "runs/keep=0.5", "samples=1", "samples=2", "budget=64")
    assert run.ckpt == ("a", "b", "c", "d", "runs/keep=0.5")
    assert run.samples == 2
    assert run.budget == (64,)
    assert parsed("keep=0.5,0.25", "--keep", "0.1").keep == (0.1,)
    assert parsed("log.at_steps=2,3", "log.at_steps=4").log.at_steps == (4,)


def test_a_repeated_policy_replaces_where_there_is_one() -> None:
    assert parse(ExportConfig, ["ckpt=a.ckpt", "out=x", "ckpt=b.ckpt"], "export")[0].ckpt == "b.ckpt"


@pytest.mark.parametrize(("schema", "lengths"), [(TrainConfig, (256, 256)), (EvalConfig, (256,))])
def test_one_length_is_enough_in_both_programs(
    schema: type[Any], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    config = parse(schema, ["config=quickstart", "lengths=256", "output=x"], schema.__name__[:-6].lower())[0]
    assert getattr(config, "data", config).lengths == lengths


def test_two_bounds_are_one_value_or_two() -> None:
    assert parsed("bounds=256").bounds == (256, 256)
    assert parsed("bounds=16,32").bounds == (16, 32)
    assert complaint("bounds=1,2,3").startswith("bounds=1,2,3: expected ")


def test_a_terminal_without_the_characters_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(run: Run, resolved: str) -> None:
        print("1 ± 2 · 3 – 4 … ünd")

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stream)
    assert run_main(main, ["samples=1"], "eval") == 0
    assert stream.buffer.getvalue() == b"1 +- 2 | 3 - 4 ... ?nd\n"


def test_scalars_take_one_value_signs_and_exponents_included() -> None:
    run = parsed("--rate", "1e-4", "--model", "m=1", "log.at_steps=2,3", "loop.max_steps=-5")
    assert (run.rate, run.model, run.log.at_steps, run.loop["max_steps"]) == (1e-4, "m=1", (2, 3), -5)


def test_a_named_config_comes_first_wherever_it_stands() -> None:
    assert parsed("samples=5", "config=quickstart") == parsed("config=quickstart", "samples=5")
    run = parsed("samples=5", "config=quickstart")
    assert (run.samples, run.keep, run.log) == (5, (0.25, 0.1), Log("online"))
    assert parsed("config=quickstart", "keep=0.05").keep == (0.05,)
    assert parsed("config=quickstart", "log=null").log is None


def test_a_config_is_a_path_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("samples: 4\n")
    assert parsed(f"config={tmp_path / 'mine.yaml'}").samples == 4


def test_a_config_may_stand_on_another_one_in_a_folder_below(configs: Path) -> None:
    (configs / "more").mkdir()
    (configs / "more" / "base.yaml").write_text("samples: 8\nrate: 0.5\nloop: {max_steps: 3}\nlog: {at_steps: [5]}\n")
    (configs / "more" / "top.yaml").write_text("config: base.yaml\nrate: 0.25\nlog: {mode: online}\n")
    run, text = parse(Run, ["config=more/top", "keep=0.1"], "eval")
    assert (run.samples, run.rate, run.keep) == (8, 0.25, (0.1,))
    assert run.loop == {"max_steps": 3, "accelerator": "auto"}
    assert run.log == Log("online", (1,))  # a group is replaced as a whole
    assert set(yaml.safe_load(text)) == set(vars(run))


def test_the_resolved_yaml_gives_the_same_run_again(tmp_path: Path) -> None:
    run, text = parse(Run, ["config=quickstart", "budget=64,32", "loop.max_steps=3", "samples=9"], "eval")
    assert set(yaml.safe_load(text)) == set(vars(run))
    (tmp_path / "again.yaml").write_text(text)
    assert parsed(f"config={tmp_path / 'again.yaml'}") == run


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("sampels=3", "sampels=3: unknown key; did you mean samples?"),
        ("max_steps=3", "max_steps=3: unknown key; did you mean loop.max_steps?"),
        ("loop.max_stepz=3", "loop.max_stepz=3: unknown key; did you mean loop.max_steps?"),
        ("log.mod=online", "log.mod=online: unknown key; did you mean log.mode?"),
        ("b=1", "b=1: unknown key"),
        ("samples=ten", "samples=ten: expected int, got ten"),
        ("samples=1.5", "samples=1.5: expected int, got 1.5"),
        ("samples=", "samples=: expected int, got nothing"),
        ("loop.max_steps=ten", "loop.max_steps=ten: expected int, got ten"),
        ("bounds=x", "bounds=x: expected int, got x"),
        ("keep=0.5,x", "keep=0.5,x: expected float, got x"),
        ("setting=both", "setting=both: expected one of 'agnostic', 'aware', got both"),
        ("log.mode=on", "log.mode=on: expected one of 'offline', 'online', got on"),
        ("samples=0", "samples=0: expected at least 1"),
        ("--samples", "--samples: expected key=value or --key value"),
        ("samples", "samples: expected key=value or --key value"),
        ("config=quikstart", "config=quikstart: expected a YAML file or one of: quickstart; did you mean quickstart?"),
        ("config=no/such.yaml", "config=no/such.yaml: expected a YAML file or one of: quickstart"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_word_as_typed(word: str, line: str) -> None:
    assert complaint(word) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("sampels: 3", "sampels: unknown key; did you mean samples?"),
        ("samples: ten", "samples: expected int, got ten"),
        ("keep: 0.5", "keep: expected list, got 0.5"),
        ("log: {mod: online}", "log.mod: unknown key; did you mean log.mode?"),
    ],
)
def test_a_fault_in_the_file_names_the_file(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert complaint(f"config={tmp_path / 'mine.yaml'}", "samples=3") == f"config={tmp_path / 'mine.yaml'}: {line}"


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("samples: [3\n")
    fault = "expected YAML: expected ',' or ']', but got '<stream end>' in line 2"
    assert complaint(f"config={tmp_path / 'mine.yaml'}") == f"config={tmp_path / 'mine.yaml'}: {fault}"
    (tmp_path / "above.yaml").write_text("config: mine.yaml\n")
    above = f"config={tmp_path / 'above.yaml'}"
    assert complaint(above) == f"{above}: {tmp_path / 'mine.yaml'}: {fault}"


def test_every_shipped_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shipped = [path.relative_to(named_configs.CONFIGS) for path in named_configs.CONFIGS.rglob("*.yaml")]
    assert {path.parts[0] for path in shipped} >= {"eval", "policies"}
    for path in shipped:
        kind, *name = path.with_suffix("").parts
        assert find_config(kind, "/".join(name)) == named_configs.CONFIGS / path


def nothing(run: Run, resolved: str) -> None:
    assert yaml.safe_load(resolved)["samples"] == run.samples


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("model=x:\n  no such folder"), 2, "error: model=x: no such folder\n"),
        (RunError("NaN in the output"), 1, "error: NaN in the output\n"),
        (OSError(28, "No space left on device", "last.ckpt"), 1, "error: no space left on disk for last.ckpt\n"),
        (OSError(30, "Read-only file system", "x"), 2, "error: x: cannot be written or read: Read-only file system\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str) -> None:
    def main(run: Run, resolved: str) -> None:
        raise error

    assert run_main(main, ["samples=1"], "eval") == code
    assert capsys.readouterr().err == line


def test_a_good_run_returns_zero_and_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(nothing, ["samples=1"], "eval") == 0
    assert capsys.readouterr().err == ""

    def main(run: Run, resolved: str) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_main(main, ["samples=1"], "eval")


def test_no_arguments_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(nothing, [], "eval") == 2
    assert "expected config=NAME|PATH or key=value; names: quickstart" in capsys.readouterr().err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(nothing, ["--help"], "eval")
    assert stop.value.code == 0
    assert "--loop.max_steps" in capsys.readouterr().out


def test_a_key_may_have_the_name_of_a_mappings_method() -> None:
    config, resolved = parse(EvalConfig, ["ckpt=snapkv", "keys=greek"], "eval")
    assert config.keys == "greek"
    assert yaml.safe_load(resolved)["keys"] == "greek"


@dataclass(frozen=True)
class Group:
    """Some settings.

    Args:
        lengths: documented here.
    """

    lengths: tuple[int, ...] = ()
    log: Log | None = None


@dataclass(frozen=True)
class Grouped:
    group: Group = field(default=Group(), metadata={"flat": True})
    model: str = "reference"


def test_keys_of_a_flat_group_are_typed_without_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    run, text = parse(Grouped, ["lengths=3,4", "log.mode=online", "model=m"], "eval")
    assert run == Grouped(Group((3, 4), Log("online")), "m")
    assert set(yaml.safe_load(text)) == {"lengths", "log", "model"}
    with pytest.raises(UserError, match="lenghts=3: unknown key; did you mean lengths"):
        parse(Grouped, ["lenghts=3"], "eval")
    with pytest.raises(SystemExit):
        parse(Grouped, ["--help"], "eval")
    assert "documented here" in capsys.readouterr().out
