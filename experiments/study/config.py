"""What a study consists of: the keys of `python -m experiments.study`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments.study.comparison import Comparison
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig, Setting
from learnkv.persistence.methods import method, select_methods
from learnkv.persistence.policies import SHIPPED, describe_policy_file

Stage = Literal["train", "measure", "write"]


NAME = "study"


@dataclass(frozen=True)
class Samples:
    """Prompts per task and length.

    Args:
        evaluated: of the policy under study and of the best other methods.
        ablations: of its variants.
        baselines: of every other method.
        out_of_domain: for other lengths, templates, haystacks and keys.
        text: windows of held-out text.
    """

    evaluated: int = 200
    ablations: int = 50
    baselines: int = 20
    out_of_domain: int = 25
    text: int = 60


@dataclass(frozen=True)
class StudyConfig:
    """Train a policy and its variants, compare them with all other methods, write what came of it.

    Every training and every comparison continues where an earlier run of the same command ended.

    Args:
        learned: training YAML (a path, or a name in configs/train) of the policy under study, or the name of a policy
            that ships, which is not trained anew.
        ablations: training YAMLs of its parts; the table names them `learned-…`, as their files.
        objectives: training YAMLs of other objectives.
        single: training YAMLs with one kept fraction each.
        uniform: training YAML of a policy, or the name of one that ships, whose scores comparisons have at uniform
            precisions.
        unseen: training YAML of a policy that never saw a retrieval task, or the name of one that ships.
        held_out: training YAMLs with `hold_out`; each is scored on the tasks of the families that it never saw.
        shorter: training YAML of a policy trained on shorter prompts, compared at the longer ones.
        baselines: the other methods, as in eval: names in configs/policies or paths, `all`, or kinds; `-` leaves out.
            Criteria are set by those without training; trained ones are named beside them.
        training: more words for every training, such as trainer.max_steps=100.
        training_text: files of text to train on, none of the held-out; docstrings of the standard library if not given.
        records: folders of earlier comparisons whose samples are used wherever they apply.
        model: hub id, folder, or `reference`.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:N or mps.
        keep: fractions of the prompt's entries to keep.
        tasks: RULER's task names; none for a model that has not learned them.
        setting: query_agnostic reads the question after compression, query_aware before it.
        length: prompt length in tokens.
        longer: other lengths.
        text: held-out text; docstrings of packages of the standard library if not given.
        haystack: another text to hide needles in; those docstrings if not given.
        samples: how many prompts.
        comparisons: what to measure, by name, in place of the sequence for the reference model; keys that a comparison
            has of its own are then those of the comparison.
        only: comparisons to measure; all of them if not given. Processes may measure different ones at the same time.
        portion: of every comparison's prompts; with a larger one the same command goes on.
        batch_size: prompts read at once.
        min_full_score: score of the full cache below which a task does not count.
        best: how many of the other methods are measured as often as the policy under study.
        stages: train, measure, write, or some of them.
        output: folder of trainings and samples.
        out: folder for study.md, study.json and pictures; study.md links to a study_findings.md there, written by hand.
        name: of these files, in place of study.
        commit: that the study was run at; the one checked out here if not given.
        seed: of the prompts.
    """

    learned: str = "learned"
    ablations: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    single: tuple[str, ...] = ()
    uniform: str | None = None
    unseen: str | None = None
    held_out: tuple[str, ...] = ()
    shorter: str | None = None
    baselines: tuple[str, ...] = ("snapkv",)
    training: tuple[str, ...] = ()
    training_text: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    model: str = "reference"
    dtype: str = "auto"
    device: str = "auto"
    keep: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05, 0.02)
    tasks: tuple[str, ...] = ("niah", "vt")
    setting: tuple[Setting, ...] = ("query_agnostic", "query_aware")
    length: int = 1024
    longer: tuple[int, ...] = (2048,)
    text: str | None = None
    haystack: str | None = None
    samples: Samples = field(default_factory=Samples)
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    portion: float = 1.0
    batch_size: int = 60
    min_full_score: float = 80.0
    best: int = 5
    stages: tuple[Stage, ...] = ("train", "measure", "write")
    output: str = "runs/study"
    out: str = "docs/results"
    name: str = NAME
    commit: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for key, count in vars(self.samples).items():
            if count < 1:
                raise UserError(f"samples.{key}={count}: expected at least 1")
        if self.best < 1 or not self.baselines:
            raise UserError(f"best={self.best} baselines={','.join(self.baselines)}: expected at least one method")
        select_methods(self.baselines)  # a mistyped name is an error before anything is trained
        names = list(map(name_of, self.variants))
        for name in names:
            if not name.startswith("learned") or names.count(name) > 1:
                raise UserError(f"{name}: expected training YAMLs of different names that begin with `learned`")
        if not 0 < self.portion <= 1:
            raise UserError(f"portion={self.portion:g}: expected above 0 and at most 1")
        for name in self.only:
            if name not in self.comparisons:
                raise UserError(f"only={name}: expected one of {', '.join(self.comparisons)}")
        for name, one in self.comparisons.items():
            one.check_choice(name, self.comparisons)
            if "uniform" in one.policies and self.uniform is None:
                raise UserError(f"comparisons.{name}.policies=uniform: expected uniform= with its scores, got none")

    @property
    def variants(self) -> list[str]:
        """Every training YAML, the policy under study first."""
        others = [one for one in (self.unseen, self.shorter) if one is not None]
        uniform = [self.uniform] if self.uniform not in (None, self.learned) else []
        return [self.learned, *self.ablations, *self.objectives, *self.single, *uniform, *others, *self.held_out]

    @property
    def methods(self) -> list[str]:
        """The other methods: names in configs/policies, or paths."""
        return select_methods(self.baselines)

    @property
    def in_bytes(self) -> bool:
        """Whether the comparisons have budgets of bytes, and with them the criteria."""
        return any(one.bytes for one in self.comparisons.values())

    @property
    def trained(self) -> list[str]:
        """Those of them that were trained by gradient descent."""
        return [name_of(path) for path in self.methods if "trained" in method(path).kinds]

    @property
    def folder(self) -> Path:
        """Where trainings and samples are."""
        return Path(self.output).expanduser()

    def comparison(self, **changes: object) -> EvalConfig:
        """The keys of one comparison."""
        keys: dict[str, object] = {
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "keep": self.keep,
            "tasks": self.tasks,
            "lengths": (self.length,),
            "setting": self.setting,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        return EvalConfig(**{**keys, **changes})  # type: ignore[arg-type]


def name_of(variant: str) -> str:
    """What a variant is called in tables: its file's name, or the one that the package gives it."""
    return describe_policy_file(variant) if ships(variant) else Path(variant).name.removesuffix(".yaml")


def ships(variant: str) -> bool:
    """Whether a variant is a policy of this package, which is not trained anew."""
    return variant in SHIPPED
