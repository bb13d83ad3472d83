"""The suites that `tasks=` knows."""

from collections.abc import Sequence

from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.babilong import Babilong
from learnkv.evaluation.tasks.coreference import Coreference
from learnkv.evaluation.tasks.instructions import Instructions
from learnkv.evaluation.tasks.longbench import LongBench
from learnkv.evaluation.tasks.longbench_v2 import LongBenchV2
from learnkv.evaluation.tasks.needle_grid import NeedleGrid
from learnkv.evaluation.tasks.paraphrase import Paraphrase
from learnkv.evaluation.tasks.reasoning import Reasoning
from learnkv.evaluation.tasks.suite import Suite

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        LongBench(),
        LongBenchV2(),
        Babilong(),
        NeedleGrid(),
        Paraphrase(),
        Coreference(),
        Instructions(),
        Reasoning(),
    )
}
"""By their names."""


def suite_names() -> list[str]:
    """Names of suites and of their tasks."""
    return [name for suite in SUITES.values() for name in dict.fromkeys((suite.name, *suite.tasks))]


def suites_named(names: Sequence[str], config: EvalConfig) -> dict[Suite, list[str]]:
    """The tasks of every suite that `names` has, each once; the suite's name stands for its default tasks."""
    chosen = {
        suite: dict.fromkeys(
            task
            for name in names
            for task in (suite.default_tasks(config) if name == suite.name else (name,))
            if task in suite.tasks
        )
        for suite in SUITES.values()
    }
    return {suite: list(tasks) for suite, tasks in chosen.items() if tasks}
