"""The keys of `python -m experiments.suites`."""

from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Literal

from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig, Metric, Setting
from learnkv.evaluation.suite_keys import SuiteKeys

Stage = Literal["measure", "write"]


@dataclass(frozen=True)
class Part:
    """One command of a page: keys are those of eval.

    Args:
        tasks: suites or their tasks.
        lengths: prompt lengths in tokens.
        setting: query_agnostic or query_aware.
        score: generated or forced.
        keep: fractions of the prompt's entries to keep.
        budget: entries per head, in place of keep.
        samples: prompts per task, length and depth.
        ckpt: policies in place of those of all parts.
        baselines: methods in place of those of all parts.
        batch_size: prompts read at once; default: as many as fit into eval's default of tokens.
        max_new_tokens: most tokens of an answer, where a task would allow more.
        answers: prompts whose answers are written at once, policies side by side; default: one policy after the other.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = (4096,)
    setting: tuple[Setting, ...] = ("query_agnostic",)
    score: Metric = "generated"
    keep: tuple[float, ...] = ()
    budget: tuple[int, ...] = ()
    samples: int = 25
    ckpt: tuple[str, ...] | None = None
    baselines: tuple[str, ...] | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    answers: int | None = None

    def __post_init__(self) -> None:
        if bool(self.keep) == bool(self.budget):
            raise UserError(f"tasks={','.join(self.tasks)}: expected keep= or budget= in every part of a page")


@dataclass(frozen=True)
class SuitesConfig:
    """Measure suites of tasks on one model and write a page of each.

    Args:
        model: hub id, folder, or a name that the package knows.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:N or mps.
        ckpt: policies to compare.
        baselines: methods to compare with.
        pages: for every page its parts by name.
        only: pages, or parts as in longbench.short; all of them if not given. Processes may measure different pages
            at the same time.
        portion: of the samples of every part; with a larger one the same command goes on.
        suite: where rows of the suites are.
        haystack: text that needles are hidden in.
        seed: of the prompts.
        stages: measure, write, or both.
        name: of the YAML in configs/study, for the pages.
        output: folder of samples, with one of each page.
        out: folder for NAME.md, NAME.json and pictures of every page, and for report.html.
        views: prompts of a page whose tokens report.html shows, by page; of benchmarks' rows none.
    """

    model: str = "reference"
    dtype: str = "auto"
    device: str = "auto"
    ckpt: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ("snapkv",)
    pages: dict[str, dict[str, Part]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    portion: float = 1.0
    suite: SuiteKeys = field(default_factory=SuiteKeys)
    haystack: str | None = None
    seed: int = 42
    stages: tuple[Stage, ...] = ("measure", "write")
    name: str = "suites"
    output: str = "runs/suites"
    out: str = "docs/results"
    views: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.portion <= 1:
            raise UserError(f"portion={self.portion:g}: expected above 0 and at most 1")
        names = {f"{page}.{part}" for page, parts in self.pages.items() for part in parts} | self.pages.keys()
        for name in self.only:
            if name not in names:
                raise UserError(f"only={name}: expected some of {', '.join(sorted(names))}")
        for page in self.views:
            if page not in self.pages:
                raise UserError(f"views.{page}: expected one of {', '.join(self.pages)}")

    @property
    def folder(self) -> Path:
        """Where samples are."""
        return Path(self.output).expanduser()

    @property
    def parts(self) -> list[tuple[str, str]]:
        """Page and name of the parts to measure."""
        listed = [(page, part) for page, parts in self.pages.items() for part in parts]
        return [one for one in listed if not self.only or {one[0], ".".join(one)} & {*self.only}]

    def keys_of(self, page: str, name: str) -> EvalConfig:
        """A part as the keys of eval."""
        part = self.pages[page][name]
        suite = self.suite
        if part.max_new_tokens is not None:
            suite = replace(suite, max_new_tokens=part.max_new_tokens)
        return EvalConfig(
            ckpt=self.ckpt if part.ckpt is None else part.ckpt,
            baselines=self.baselines if part.baselines is None else part.baselines,
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            keep=part.keep,
            budget=part.budget,
            tasks=part.tasks,
            lengths=part.lengths,
            setting=part.setting,
            score=part.score,
            samples=ceil(part.samples * self.portion),
            batch_size=part.batch_size,
            answers=part.answers,
            haystack=self.haystack,
            suite=suite,
            output=str(self.folder / page),
            viewer=self.views.get(page, 0),
            seed=self.seed,
        )
