"""The way of one prompt and of one training step through the files, traced: `python -m tools.walk [--write]`.

`--write` puts it into docs/design.md, where tests/test_walk.py compares it with a new trace.
"""

import argparse
import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "learnkv"
DOCUMENT = ROOT / "docs" / "design.md"
MARKS = ("<!-- walk: begin -->", "<!-- walk: end -->")


@dataclass
class Walk:
    """Files that a function's calls lead to, in the order in which they are reached."""

    root: str
    """Name of the function whose own calls are the steps."""
    steps: dict[str, list[str]] = field(default_factory=dict)
    """Files of every step, by the name of the function that is called."""
    upward: dict[tuple[str, str], int] = field(default_factory=dict)
    """Calls from a room to one above it, as callbacks make them."""
    stack: list[tuple[FrameType, str]] = field(default_factory=list)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function: follows calls and returns of the package's files."""
        file = frame.f_code.co_filename
        if not file.startswith(str(PACKAGE)) or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            name = Path(file).relative_to(PACKAGE).as_posix()
            self._enter(name, frame.f_code.co_name)
            self.stack.append((frame, name))
        elif event == "return" and self.stack and self.stack[-1][0] is frame:
            self.stack.pop()

    def _enter(self, file: str, function: str) -> None:
        if self.stack and HEIGHT[_room(file)] > HEIGHT[_room(self.stack[-1][1])]:
            rooms = _room(self.stack[-1][1]), _room(file)
            self.upward[rooms] = self.upward.get(rooms, 0) + 1
        callers = [frame.f_code.co_name for frame, _ in self.stack]
        depth = callers.index(self.root) + 1 if self.root in callers else 0
        step = self.stack[depth][0].f_code.co_name if len(self.stack) > depth else function
        files = self.steps.setdefault(step.strip("_"), [])
        if function != self.root and file not in files:
            files.append(file)

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Follow what is called within."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            self.stack.clear()


def _floors() -> list[set[str]]:
    """The rooms from the ground up, as tests/test_layering.py states them."""
    tree = ast.parse((ROOT / "tests" / "test_layering.py").read_text(encoding="utf-8"))
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    (value,) = (node.value for node in assigned if getattr(node.targets[0], "id", "") == "FLOORS")
    floors: list[set[str]] = ast.literal_eval(value)
    return floors


HEIGHT = {room: height for height, floor in enumerate(_floors()) for room in floor}


def _room(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def walk_of_a_prompt() -> Walk:
    """Prefill, plan and evict, two tokens."""
    from learnkv import generate, load_model, load_policy, prefill

    model, tokenizer = load_model("reference")
    policy = load_policy("adakv")
    ids = tokenizer("Rain fell on the hills. " * 30, return_tensors="pt").input_ids
    question = tokenizer("What fell?", return_tensors="pt").input_ids
    walk = Walk("")
    with walk.traced():
        cache = prefill(model, ids, policies=[policy])
        small = policy.compress(cache.fork(), keep=0.2)
        generate(model, question, small, max_new_tokens=2)
    return walk


def walk_of_a_training_step() -> Walk:
    """One step of config=quickstart on short contexts: forward, then backward."""
    from learnkv.cli.main import main
    from learnkv.training.module import Distillation

    walk = Walk("training_step")
    with tempfile.TemporaryDirectory() as folder, _followed(Distillation, walk):
        words = ["trainer.max_steps=1", "lengths=128,128", "validation_batches=1", "wandb=null", f"output={folder}"]
        assert main(["train", "config=quickstart", *words]) == 0
    return walk


@contextmanager
def _followed(kind: Any, walk: Walk) -> Iterator[None]:
    """Trace a Lightning module's training step and backward pass."""
    before = {name: getattr(kind, name) for name in ("training_step", "backward")}

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with walk.traced():
                return function(*args, **kwargs)

        return call

    for name, function in before.items():
        setattr(kind, name, traced(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(kind, name, function)


def drawing() -> str:
    """Both walks as Markdown."""
    torch.manual_seed(0)
    walks = {
        "One prompt": walk_of_a_prompt(),
        "One training step": walk_of_a_training_step(),
    }
    return "\n".join(line for title, walk in walks.items() for line in _lines(title, walk))


def _lines(title: str, walk: Walk) -> list[str]:
    lines = [f"### {title}", "", "| step | files, in the order in which they are reached |", "| --- | --- |"]
    for step, files in walk.steps.items():
        if files:
            lines.append(f"| {step} | {' → '.join(f'`{file}`' for file in files)} |")
    upward = [f"{low} → {high} ({count} ×)" for (low, high), count in sorted(walk.upward.items())]
    return [*lines, "", f"Calls upward: {', '.join(upward) or 'none'}.", ""]


def main() -> int:
    """Print the drawing, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    text = drawing()
    if write:
        head, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
        tail = rest.partition(MARKS[1])[2]
        DOCUMENT.write_text(f"{head}{MARKS[0]}\n{text}{MARKS[1]}{tail}", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
