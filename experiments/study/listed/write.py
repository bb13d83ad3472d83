"""NAME.md, NAME.json and pictures of a study that lists its comparisons."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.method_comparison.tables import head
from experiments.study.config import StudyConfig, name_of
from experiments.study.criteria import Line
from experiments.study.listed import byte_criteria, pictures
from experiments.study.listed.archive import file_of, write_archive
from experiments.study.listed.criteria import MAIN, Measured, lines
from experiments.study.listed.kl import best_by_kl, kl_scores
from experiments.study.listed.page import page
from experiments.study.measure import samples
from experiments.study.report import report_of
from learnkv.errors import UserError
from learnkv.evaluation import pictures as of_eval
from learnkv.evaluation.panels import panel_of
from learnkv.evaluation.results import FULL, Record, budget_of, prompt_key, rows_of
from learnkv.formats import duo, headkv
from learnkv.formats.files import MODELS_WITH_TABLES, write_text
from learnkv.persistence.policies import describe_policy_file

SHOWN = 6
"""Other policies in the picture of the main result."""


def write_listed(config: StudyConfig, resolved: str) -> None:
    """Each file replaced in one step."""
    measured = Measured(config, {name: _recorded(config, name) for name in config.comparisons})
    if not any(measured.records.values()):
        raise UserError(f"output={config.output}: nothing has been measured yet, expected stages=measure first")
    out, commit = Path(config.out), config.commit or head()
    out.mkdir(parents=True, exist_ok=True)
    criteria: list[Line] = list(byte_criteria.lines(measured) if config.in_bytes else lines(measured))
    drawn = _draw(measured, out)
    write_text(out / f"{config.name}.md", "\n".join(page(measured, criteria, commit, drawn)).rstrip() + "\n")
    rows = {name: rows_of(records) for name, records in measured.records.items() if records}
    report = report_of(config, resolved, commit, criteria, rows)
    write_text(out / f"{config.name}.json", json.dumps(report) + "\n")
    archive = write_archive(out / file_of(config.name), measured.records)
    for line in criteria:
        print(f"{line.verdict:12} {line.about}: {line.measured}")
    print("\n".join(str(out / file) for file in (f"{config.name}.md", f"{config.name}.json", archive.name, *drawn)))


def _recorded(config: StudyConfig, name: str) -> list[Record]:
    """Samples of a comparison of policies in the study, on prompts that the full cache has finished."""
    known = {FULL, *map(describe_policy_file, config.methods), *map(name_of, config.variants)}
    records = [one for one in samples(config.folder / name) if one["policy"].partition("@")[0] in known]
    prompts = {prompt_key(one) for one in records if one["policy"] == FULL}
    return [one for one in records if prompt_key(one) in prompts]


def _draw(measured: Measured, out: Path) -> list[str]:
    """Gives the names of the files."""
    main, heat = (measured.records.get(name, []) for name in (MAIN, "heat-map"))
    figures: dict[str, Figure | None] = {
        "pareto": _main_result(measured),
        "budgets": of_eval.heatmap(main, measured.policy),
        "bits": pictures.bits(main, measured.policy),
        "needles": pictures.needle_heatmap(heat, list(dict.fromkeys(one["policy"] for one in heat))),
        "heads": _agreement(measured, main),
    }
    names = []
    for about, figure in figures.items():
        if figure is not None:
            names.append(f"{measured.config.name}-{about}.png")
            of_eval.save(figure, out / names[-1])
    return names


def _main_result(measured: Measured) -> Figure | None:
    """Loss against bytes: needles and books by forced scores, generated ones in a panel of their own."""
    shown: list[Record] = []
    for name in (MAIN, "generated", "text"):
        records = measured.records.get(name, [])
        if not records:
            continue
        scores = kl_scores(records, measured.config)
        best = best_by_kl(scores, SHOWN) if name != "generated" else []
        names = {FULL, measured.policy, *scores.whole, *best, *measured.uniform(scores)}
        shown += [one for one in records if not best or one["policy"] in names]
    lengths = {panel_of(one) for one in shown}
    return of_eval.pareto(rows_of(shown)) if lengths else None


def _agreement(measured: Measured, main: Sequence[Record]) -> Figure | None:
    """Learned budgets against what other methods measure of heads, where the package has their tables."""
    own = [one for one in main if one["policy"] == measured.policy and "budgets" in one]
    if not own:
        return None
    smallest = max(map(budget_of, own), key=lambda budget: budget.order)
    budgets = np.mean([one["budgets"] for one in own if budget_of(one) == smallest], axis=0)
    return pictures.agreement(budgets, _head_scores(measured.config.model, budgets.shape))


def _head_scores(model: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Scores [L, H] per kv head of the model's tables: query heads of a group at their mean."""
    found: dict[str, np.ndarray] = {}
    folder = MODELS_WITH_TABLES.get(model)
    if folder is None:
        return found
    for name, file in (("HeadKV", "head_scores.json"), ("retrieval heads", "copying_heads.json")):
        if (folder / file).is_file():
            means = np.array([[np.mean(trials) for trials in heads] for heads in headkv.read(folder / file)])
            found[name] = means.reshape(*shape, -1).mean(-1)
    if (folder / "duo").is_dir():
        found["DuoAttention"] = duo.read(folder / "duo").gates.numpy()
    return found
