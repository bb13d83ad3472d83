"""study.json: what a study measured, for programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from experiments.study.config import StudyConfig
from experiments.study.criteria import Line
from experiments.study.page import COMMAND
from learnkv.evaluation.results import SCHEMA


def report_of(
    config: StudyConfig,
    resolved: str,
    commit: str,
    criteria: Sequence[Line],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Keys, criteria and rows by the name of the comparison."""
    return {
        "schema": SCHEMA,
        "model": config.model,
        "command": COMMAND,
        "commit": commit,
        "config": yaml.safe_load(resolved),
        "must_hold": [dataclasses.asdict(line) for line in criteria],
        "rows": rows,
    }
