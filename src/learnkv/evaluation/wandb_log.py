"""An evaluation in Weights & Biases: its rows as tables, its pictures, and its files as an artifact."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from learnkv.evaluation.results import GROUP
from learnkv.persistence.wandb_options import Wandb

FILES = ("config.yaml", "results.json", "results.md", "leaderboard.csv", "samples.jsonl", "report.html")


def log(
    options: Wandb,
    output: Path,
    keys: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    leaderboard: Sequence[Mapping[str, Any]],
) -> None:
    """Log a finished evaluation; a failure is a line of warning, as the results are in their folder.

    Args:
        output: folder of the evaluation; offline runs are written below it.
        keys: all keys of the evaluation.
        rows: of `results.json`.
        leaderboard: rows of `leaderboard.csv`.
    """
    try:
        _log(options, output, keys, rows, leaderboard)
    except Exception as error:  # whatever a logger raises
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: W&B failed ({reason}); the results are in {output}", file=sys.stderr)


def _log(
    options: Wandb,
    output: Path,
    keys: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    leaderboard: Sequence[Mapping[str, Any]],
) -> None:
    name = options.name or output.resolve().name
    settings = wandb.Settings(silent=True)
    with wandb.init(
        project=options.project,
        entity=options.entity,
        name=name,
        mode=options.mode,
        dir=str(output),
        config=dict(keys),
        job_type="eval",
        settings=settings,
    ) as run:
        run.log({"results": _table(rows), "leaderboard": _table(leaderboard), **_pictures(output)})
        for row in rows:
            run.summary[_path(row)] = row["score"]
        artifact = wandb.Artifact(f"evaluation-{run.id}", type="evaluation")
        for file in (output / name for name in FILES):
            if file.is_file():
                artifact.add_file(str(file))
        run.log_artifact(artifact)


def _pictures(output: Path) -> dict[str, Any]:
    return {file.stem: wandb.Image(str(file)) for file in sorted(output.glob("*.png"))}


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in rows])


def _path(row: Mapping[str, Any]) -> str:
    """Name of a row's score in the run's summary."""
    parts = (str(row[key]) for key in ("task", "length", "setting", *GROUP[-3:]) if row[key] is not None)
    return "/".join(["score", row["policy"], *parts])
