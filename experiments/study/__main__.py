"""`python -m experiments.study config=study [key=value …]`: train, compare, and write what came of it."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from matplotlib.figure import Figure

from experiments.method_comparison.tables import head
from experiments.study.config import StudyConfig
from experiments.study.criteria import lines
from experiments.study.measure import MAIN, TEXT, Comparisons
from experiments.study.page import COMMAND, page
from experiments.study.results import Evidence, gather, recorded
from experiments.study.scores import LEARNED, best_of
from experiments.study.variants import train_missing, trainings
from learnkv.cli.parser import run_main
from learnkv.errors import UserError
from learnkv.evaluation import pictures
from learnkv.evaluation.results import FULL, Record, rows_of
from learnkv.evaluation.store import replacing


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; gives the exit code."""
    return run_main(study, argv, "study")


def study(config: StudyConfig, resolved: str) -> None:
    """Train what is missing, measure what is missing, write everything that has been measured."""
    trainings(config)  # what is wrong with one of them is told before the first begins
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"output={config.output}: expected a folder that can be written ({error})") from None
    (config.folder / "config.yaml").write_text(resolved, encoding="utf-8")
    if "train" in config.stages:
        train_missing(config)
    if "measure" in config.stages:
        Comparisons(config).run()
    if "write" in config.stages:
        write(config, resolved)


def write(config: StudyConfig, resolved: str) -> None:
    """study.md, study.json and pictures, each file replaced in one step."""
    found, out, commit = gather(config), Path(config.out), config.commit or head()
    if not found.settings and found.text is None:
        raise UserError(f"output={config.output}: nothing has been measured yet, expected stages=measure first")
    out.mkdir(parents=True, exist_ok=True)
    bars = list(lines(found))
    drawn = draw(config, found, out)
    with replacing(out / "study.md") as part:
        part.write_text("\n".join(page(config, found, bars, commit, drawn)).rstrip() + "\n", encoding="utf-8")
    held = {
        "schema": 1,
        "model": config.model,
        "command": COMMAND,
        "commit": commit,
        "config": yaml.safe_load(resolved),
        "must_hold": [dataclasses.asdict(one) for one in bars],
        "rows": {
            name: rows_of(_with_full(recorded(config, name)))
            for name in (MAIN, TEXT, *found.elsewhere)
            if (config.folder / name / "samples.jsonl").is_file()
        },
        "changed": found.changed,
    }
    with replacing(out / "study.json") as part:
        part.write_text(json.dumps(held) + "\n", encoding="utf-8")
    for one in bars:
        print(f"{one.verdict:12} {one.about}: {one.measured}")
    print("\n".join(str(out / name) for name in ("study.md", "study.json", *drawn)))


def draw(config: StudyConfig, found: Evidence, out: Path) -> list[str]:
    """Score against bytes, budgets by layer and head, and what one more entry is worth; gives the files' names."""
    figures: dict[str, Figure | None] = {}
    best = best_of(found.settings.values(), config.best)
    shown = [record for scores in found.settings.values() for record in scores.records]
    if found.text is not None:
        shown += found.text.records
    shown = [one for one in shown if one["policy"] in (FULL, found.judged, *best)]
    if shown:
        figures["study-pareto.png"] = pictures.pareto(rows_of(_with_full(shown)))
        figures["study-budgets.png"] = pictures.heatmap(shown, found.judged)
    variants = [
        record
        for scores in found.settings.values()
        for record in scores.records
        if record["policy"] == FULL or record["policy"].startswith(LEARNED)
    ]
    if variants:
        figures["study-variants.png"] = pictures.pareto(rows_of(_with_full(variants)))
    names = []
    for name, figure in figures.items():
        if figure is not None:
            pictures.save(figure, out / name)
            names.append(name)
    run = found.runs.get(found.judged)
    for name in ("marginal.png", "validation.png"):
        if run is not None and (run / name).is_file():
            shutil.copyfile(run / name, out / f"study-{name}")
            names.append(f"study-{name}")
    return names


def _with_full(records: Sequence[Record]) -> list[Record]:
    """Records of the prompts that the full cache has finished, too."""
    prompts = {_prompt(record) for record in records if record["policy"] == FULL}
    return [record for record in records if _prompt(record) in prompts]


def _prompt(record: Record) -> tuple[object, ...]:
    return record["task"], record["length"], record["setting"], record["index"]


if __name__ == "__main__":
    sys.exit(main())
