"""`python -m experiments.suites config=NAME [key=value …]`: suites of tasks on a model, and a page of each."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.study.listed.archive import file_of, read_archive, write_archive
from experiments.suites.config import SuitesConfig
from learnkv.cli.parser import run_main
from learnkv.errors import UserError
from learnkv.evaluation import pictures
from learnkv.evaluation.html.page import REPORT, Contents, write_page
from learnkv.evaluation.needle_pictures import needle_maps
from learnkv.evaluation.report import COSTS
from learnkv.evaluation.results import FULL, Record, budget_of, prompt_key, rows_of
from learnkv.evaluation.run import SAMPLES, evaluate
from learnkv.evaluation.store import Store
from learnkv.formats.files import write_text

COMMAND = "python -m experiments.suites"
RESULTS, RESULTS_TABLES = "results.json", "results.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    return run_main(suites, argv, "study", COMMAND)


def suites(config: SuitesConfig, resolved: str) -> None:
    """Measure what is missing, write the pages of everything that has been measured."""
    for page, name in config.parts:
        config.keys_of(page, name)  # an error in one of them comes before the first is measured
    if "measure" in config.stages:
        for page in dict.fromkeys(page for page, _ in config.parts):
            take_over(config, page)
        for page, name in config.parts:
            print(f"{page}.{name}", file=sys.stderr)
            keys = config.keys_of(page, name)
            evaluate(keys, yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(keys))), sort_keys=False))
    if "write" in config.stages:
        write(config, resolved)


def take_over(config: SuitesConfig, page: str) -> None:
    """Samples in the page's archive join those of its folder; eval uses the ones that apply."""
    folder = config.folder / page
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(folder / SAMPLES)
    earlier = (one for those in read_archive(Path(config.out) / file_of(page)).values() for one in those)
    store.add([dict(one) for one in earlier if one["fingerprint"] not in store])


def write(config: SuitesConfig, resolved: str) -> None:
    """NAME.md, NAME.json, pictures and samples of every page, and one report.html; each file replaced in one step.

    Pages that were measured elsewhere stay as they are; report.html has their samples, too.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pages = [page for page in config.pages if (config.folder / page / RESULTS).is_file()]
    if not pages:
        raise UserError(f"output={config.output}: nothing has been measured yet, expected stages=measure first")
    records: list[Record] = []
    results: dict[str, Any] = {}
    for page in pages:
        folder = config.folder / page
        results, measured = json.loads((folder / RESULTS).read_text(encoding="utf-8")), list(in_table(folder))
        drawn = [picture for picture in sorted(folder.glob("*.png")) if not picture.name.startswith("heatmap-")]
        for picture in drawn:
            shutil.copyfile(picture, out / f"{page}-{picture.name}")
        names = [f"{page}-{picture.name}" for picture in drawn] + smallest_maps(measured, page, out)
        write_text(out / f"{page}.md", "\n".join(text_of(config, page, results["environment"]["commit"], names)))
        write_text(out / f"{page}.json", json.dumps(results) + "\n")
        write_archive(out / file_of(page), {page: measured})
        records += measured
    for page in config.pages.keys() - {*pages}:
        records += [one for those in read_archive(out / file_of(page)).values() for one in those]
    contents = Contents(
        title=f"Suites of tasks on {config.model}",
        model=config.model,
        environment=results["environment"],
        records=records,
        rows=rows_of(records),
        command=f"{COMMAND} config={config.name}",
        config=resolved,
    )
    write_page(out / REPORT, contents)
    print("\n".join(str(out / name) for name in (*(f"{page}.md" for page in pages), REPORT)))


def in_table(folder: Path) -> Iterator[Record]:
    """Samples measured under the conditions of the last one, on prompts that the full cache has finished."""
    records = list(Store(folder / SAMPLES).records.values())
    same = [one for one in records if one["conditions_digest"] == records[-1]["conditions_digest"]]
    prompts = {prompt_key(one) for one in same if one["policy"] == FULL}
    yield from (one for one in same if prompt_key(one) in prompts)


def smallest_maps(records: Sequence[Record], page: str, out: Path) -> list[str]:
    """Heat maps of needles at the smallest budget alone, policies side by side; gives the files' names."""
    budgets = sorted({budget_of(one) for one in records if one["policy"] != FULL}, key=lambda budget: budget.order)
    maps = needle_maps(one for one in records if one["policy"] == FULL or budget_of(one) in budgets[-1:])
    files = {f"{page}-smallest-{name.removeprefix('needles-')}": figure for name, figure in maps.items()}
    for name, figure in files.items():
        pictures.save(figure, out / name)
    return list(files)


def text_of(config: SuitesConfig, page: str, commit: str | None, pictures: Sequence[str]) -> Iterator[str]:
    """Lines of a page: the tables of its evaluation without times, which say more about the machine than the method."""
    yield f"# {page} on {config.model}"
    yield ""
    command = f"{COMMAND} config={config.name}"
    yield f"Written by `{command}` at commit {commit}, with the samples of {file_of(page)}; rows are in {page}.json."
    findings = f"{page}_findings.md"
    if (Path(config.out) / findings).is_file():
        yield f"What was learned from it: [{findings}]({findings})."
    shown = True
    for line in (config.folder / page / RESULTS_TABLES).read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith("## "):
            shown = line != COSTS
        if shown:
            yield line
    yield ""
    yield from (f"![{name}]({name})" for name in pictures)
    yield ""


if __name__ == "__main__":
    sys.exit(main())
