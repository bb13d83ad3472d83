"""`python -m experiments.study config=study [key=value …]`: train, compare, and write what came of it."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.method_comparison.tables import head
from experiments.study.config import StudyConfig
from experiments.study.criteria import lines
from experiments.study.listed.measure import measure_listed
from experiments.study.listed.write import write_listed
from experiments.study.measure import MAIN, TEXT, Comparisons
from experiments.study.page import COMMAND, page
from experiments.study.report import report_of
from experiments.study.results import Results, gather, recorded
from experiments.study.scores import LEARNED, best_of
from experiments.study.variants import train_missing, trainings
from learnkv.cli.parser import run_main
from learnkv.errors import UserError
from learnkv.evaluation import pictures
from learnkv.evaluation.results import FULL, Record, prompt_key, rows_of
from learnkv.formats.files import write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    return run_main(study, argv, "study", COMMAND)


def study(config: StudyConfig, resolved: str) -> None:
    """Train what is missing, measure what is missing, write everything that has been measured."""
    trainings(config)  # an error in one of them comes before the first begins
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"output={config.output}: expected a folder that can be written ({error})") from None
    (config.folder / "config.yaml").write_text(resolved, encoding="utf-8")
    if "train" in config.stages:
        train_missing(config)
    if "measure" in config.stages:
        measure_listed(Comparisons(config)) if config.comparisons else Comparisons(config).run()
    if "write" in config.stages:
        (write_listed if config.comparisons else write)(config, resolved)


def write(config: StudyConfig, resolved: str) -> None:
    """study.md, study.json and pictures, each file replaced in one step."""
    results, out, commit = gather(config), Path(config.out), config.commit or head()
    if not results.settings and results.text is None:
        raise UserError(f"output={config.output}: nothing has been measured yet, expected stages=measure first")
    out.mkdir(parents=True, exist_ok=True)
    criteria = list(lines(results))
    drawn = draw(config, results, out)
    write_text(out / "study.md", "\n".join(page(config, results, criteria, commit, drawn)).rstrip() + "\n")
    rows = {
        name: rows_of(_with_full(recorded(config, name)))
        for name in (MAIN, TEXT, *results.out_of_domain)
        if (config.folder / name / "samples.jsonl").is_file()
    }
    report = {**report_of(config, resolved, commit, criteria, rows), "changed": results.changed}
    write_text(out / "study.json", json.dumps(report) + "\n")
    for line in criteria:
        print(f"{line.verdict:12} {line.about}: {line.measured}")
    print("\n".join(str(out / name) for name in ("study.md", "study.json", *drawn)))


def draw(config: StudyConfig, results: Results, out: Path) -> list[str]:
    """Score against bytes, budgets by layer and head, and what one more entry is worth; gives the files' names."""
    figures: dict[str, Figure | None] = {}
    best = best_of(results.settings.values(), config.best)
    shown = [record for scores in results.settings.values() for record in scores.records]
    if results.text is not None:
        shown += results.text.records
    shown = [one for one in shown if one["policy"] in (FULL, results.policy, *best)]
    if shown:
        figures["study-pareto.png"] = pictures.pareto(rows_of(_with_full(shown)))
        figures["study-budgets.png"] = pictures.heatmap(shown, results.policy)
    variants = [
        record
        for scores in results.settings.values()
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
    run = results.runs.get(results.policy)
    for name in ("marginal.png", "validation.png"):
        if run is not None and (run / name).is_file():
            shutil.copyfile(run / name, out / f"study-{name}")
            names.append(f"study-{name}")
    return names


def _with_full(records: Sequence[Record]) -> list[Record]:
    """Records of the prompts that the full cache has finished, too."""
    prompts = {prompt_key(record) for record in records if record["policy"] == FULL}
    return [record for record in records if prompt_key(record) in prompts]


if __name__ == "__main__":
    sys.exit(main())
