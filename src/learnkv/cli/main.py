"""The console command: `learnkv train | eval | calibrate | inspect | memory | compress | ask | … [key=value …]`."""

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from learnkv.cli.parser import print_anywhere, report_error, run_main
from learnkv.persistence.named_configs import nearest


class Command(NamedTuple):
    """A subcommand."""

    module: str
    function: str
    """Takes a config dataclass and its resolved YAML."""
    configs: str
    """Folder of `configs/` where `config=NAME` is looked up."""
    extra: str
    """Extra with its dependencies, for `pip install 'learnkv[EXTRA]'`; empty: none."""
    about: str
    default: tuple[str, ...] = ()
    """Words in place of an empty command line."""
    positional: str = ""
    """Keys of the words in front that name no key, the only one of all of them; empty: every word has a key."""

    def keyed(self, words: Sequence[str]) -> list[str]:
        """The words, those in front with their key; the default words where there are none."""
        keys, rest, front = self.positional.split(), list(words or self.default), list[str]()
        for key in keys:
            if rest and words and not re.match(r"-|[\w.]+=", rest[0]):
                front += [f"--{key}", rest.pop(0)]
        return front + rest


COMMANDS = {
    "train": Command("learnkv.training.run", "train", "train", "train", "train a policy for a frozen model"),
    "eval": Command("learnkv.evaluation.run", "evaluate", "eval", "eval", "compare policies on one model"),
    "calibrate": Command(
        "learnkv.calibration.run", "calibrate", "calibrate", "eval", "measure the tables that methods read", ("out=",)
    ),
    "merge": Command(
        "learnkv.evaluation.merge",
        "merge",
        "merge",
        "eval",
        "make one table of several evaluations",
        ("folders=",),
        positional="folders",
    ),
    "inspect": Command(
        "learnkv.evaluation.inspection",
        "inspect_text",
        "inspect",
        "eval",
        "show what policies keep of a text",
        ("text=",),
    ),
    "memory": Command(
        "learnkv.training.memory.predict", "report", "train", "train", "predict memory and time of a training run"
    ),
    "export": Command("learnkv.cli.export", "export", "export", "", "export a policy or its budgets", ("ckpt=",)),
    "compress": Command(
        "learnkv.cli.stored", "compress", "compress", "", "read a text once and store its compressed cache", ("text=",)
    ),
    "ask": Command("learnkv.cli.stored", "ask", "ask", "", "ask about a stored text", ("folder=",), "folder question"),
    "fetch": Command(
        "learnkv.cli.fetch", "fetch_model", "fetch", "gguf", "fetch a small model (smollm2)", ("model=",), "model"
    ),
}


OPTIONAL = frozenset(
    {"datasets", "gguf", "jieba", "jinja2", "lightning", "math_verify", "matplotlib", "peft", "platformdirs", "plotly"}
    | {"pyarrow", "rapidfuzz", "rouge", "tqdm", "wandb", "wonderwords"}
)
"""What the extras `train`, `eval` and `gguf` install."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first word names.

    Args:
        argv: words of the command line without the program's name; None: those of this process.

    Returns:
        Exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    print_anywhere()
    if words[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    if not words:
        return report_error(f"no command: expected one of {', '.join(COMMANDS)}", 2)
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        return report_error(f"{name}: expected one of {', '.join(COMMANDS)}{nearest(name, list(COMMANDS))}", 2)
    command = COMMANDS[name]
    _import_from_here()
    try:
        function = getattr(import_module(command.module), command.function)
        return run_main(function, command.keyed(rest), command.configs, f"learnkv {name}")
    except ModuleNotFoundError as error:  # some are imported only when they are needed
        missing = str(error.name).partition(".")[0]
        if missing not in OPTIONAL:
            raise
        install = f"pip install 'learnkv[{command.extra or 'eval'}]'"
        return report_error(f"learnkv {name} needs {missing}, which is not installed: {install}", 2)


def _import_from_here() -> None:
    """Let modules of the current folder be imported, after all others: a method of one's own lies there."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.append(here)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: learnkv COMMAND [config=NAME] [key=value …]", "", *lines, "", "learnkv COMMAND --help"])
