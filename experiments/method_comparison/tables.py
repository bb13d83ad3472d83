"""Tables of all methods from the samples of `python eval.py config=method_comparison`."""

import dataclasses
import json
import math
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.method_comparison.published import CLEAR, TIE, Pair, pairs
from learnkv.errors import UserError
from learnkv.evaluation import report
from learnkv.evaluation.results import FULL, Record, prompt_key, rows_of
from learnkv.evaluation.store import Store
from learnkv.formats.files import write_text
from learnkv.persistence.methods import select_methods
from learnkv.persistence.policies import load_policy

COMMAND = "python eval.py config=method_comparison"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "eval" / "method_comparison.yaml"
LEAST = 10
"""Finished prompts from which on a task counts."""
VERDICTS = ("agrees", "disagrees", "undecided", "tied")


@dataclass(frozen=True)
class TablesConfig:
    """Write NAME.md and NAME.json from finished samples.

    Args:
        results: folder that `eval.py config=method_comparison` writes to, also while it runs.
        out: folder for both files; the page links to a NAME_findings.md there, written by hand.
        name: of both files.
        commit: commit of the comparison; default: the one that is checked out.
    """

    results: str = "runs/method_comparison"
    out: str = "docs/results"
    name: str = "method_comparison"
    commit: str | None = None


def write(config: TablesConfig, resolved: str) -> None:
    """Write the tables of the prompts that all methods have finished."""
    folder, out = Path(config.results), Path(config.out)
    if not (folder / "samples.jsonl").is_file() or not (folder / "config.yaml").is_file():
        raise UserError(f"results={config.results}: expected a folder of {COMMAND}, found no samples in it")
    comparison = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    records = complete(list(Store(folder / "samples.jsonl").records.values()))
    records = _enough(records, min(LEAST, comparison.get("samples", 1)))
    if not records:
        raise UserError(f"results={config.results}: no prompt has been finished by all methods yet")
    commit = config.commit or head()
    orders = list(pairs(records))
    rows = rows_of(records)
    out.mkdir(parents=True, exist_ok=True)
    written = f"{config.name}_findings.md"
    findings = written if (out / written).is_file() else None
    write_text(out / f"{config.name}.md", "\n".join(page(comparison, records, orders, commit, findings)))
    report_json = {
        "schema": 1,
        "model": comparison["model"],
        "command": typed(comparison),
        "commit": commit,
        "config": comparison,
        "rows": rows,
        "orders": [{**dataclasses.asdict(pair), "verdict": pair.verdict} for pair in orders],
    }
    write_text(out / f"{config.name}.json", _json(report_json))
    print(f"{out / config.name}.md\n{out / config.name}.json")


def typed(comparison: Mapping[str, Any]) -> str:
    """The command of a comparison, with the keys that are not those of its YAML."""
    usual = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    parts = []
    for key in ("baselines", "model", "keep", "tasks", "lengths", "setting", "score", "samples", "text"):
        value = comparison.get(key)
        if value is not None and value != usual.get(key, {"score": "generated"}.get(key, value)):
            parts.append(f" {key}=" + (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return COMMAND + "".join(parts)


def complete(records: Sequence[Record]) -> list[Record]:
    """Records of the prompts that every policy of their setting has finished at every budget, policies outermost."""
    jobs: dict[str, dict[tuple[object, ...], None]] = {}
    done: dict[tuple[object, ...], set[tuple[object, ...]]] = {}
    for record in records:
        jobs.setdefault(record["setting"], {})[_job(record)] = None
        done.setdefault(prompt_key(record), set()).add(_job(record))
    order = {job: index for of_setting in jobs.values() for index, job in enumerate(of_setting)}
    whole = [record for record in records if len(done[prompt_key(record)]) == len(jobs[record["setting"]])]
    return sorted(whole, key=lambda record: (order[_job(record)], record["task"], record["index"]))


def _enough(records: Sequence[Record], least: int) -> list[Record]:
    """Records of the tasks of which a setting has `least` prompts: fewer would weigh as much in a mean over tasks."""
    prompts = Counter((setting, task) for _, task, _, setting, _ in {prompt_key(record) for record in records})
    return [record for record in records if prompts[record["setting"], record["task"]] >= least]


def page(
    config: Mapping[str, Any], records: Sequence[Record], orders: Sequence[Pair], commit: str, findings: str | None
) -> Iterator[str]:
    """Lines of method_comparison.md: the command, published orders, then the tables.

    Args:
        config: keys of the comparison.
        records: samples of the prompts that all methods have finished.
        orders: pairs of published orders.
        commit: commit of the comparison.
        findings: page to link to.
    """
    model = config["model"]
    yield "# Every method on one model"
    yield ""
    prompts = len({prompt_key(record) for record in records})
    yield f"Written by `python -m experiments.method_comparison` from the results of `{typed(config)}` at commit"
    yield f"{commit}: model `{model}`, {prompts:,} prompts that every method has finished,"
    yield f"of tasks with {LEAST} or more."
    wanted = math.prod(len(config.get(key, ())) for key in ("tasks", "lengths", "setting")) * config.get("samples", 0)
    if prompts < wanted:
        yield f"{wanted:,} are requested: the command continues where it was."
    if findings:
        yield f"What stands out, and why: [{findings}]({findings})."
    yield ""
    yield from _protected((*config.get("ckpt", ()), *select_methods(config.get("baselines", ()))))
    yield from _full(records)
    yield ""
    yield from _orders(orders, any(record["metric"] == "forced" for record in records))
    settings = dict.fromkeys(record["setting"] for record in records)
    of_setting = [[record for record in records if record["setting"] == setting] for setting in settings]
    tables = report.markdown(model, [row for some in of_setting for row in rows_of(some)], records, {})
    yield tables.split("\n", 2)[2]


def _orders(orders: Sequence[Pair], forced: bool) -> Iterator[str]:
    """Published orders of methods beside the measured ones."""
    yield "## The order of methods, beside the orders that others published"
    yield ""
    yield "Every pair of a published order, on the same prompts at our nearest fraction kept. Ours is clear beyond"
    yield f"{CLEAR:g} standard errors of the paired difference; published scores less than {TIE:g} point apart tie. The"
    yield "published models have 7 or 8 billion parameters: what disagrees is a property of this model, or an error."
    if forced:
        yield "Published are scores of generated answers; ours are KL from the full cache on the correct answer that is"
        yield "read, less is better, and a difference above 0 is one for the method published as better."
    yield ""
    sources = list(dict.fromkeys((pair.source, pair.setting, pair.published_keep, pair.keep) for pair in orders))
    yield f"| published by | setting | keep: theirs, ours | {' | '.join(VERDICTS)} |"
    yield f"| --- | --- | --- |{' ---: |' * len(VERDICTS)}"
    for source in sources:
        same = [pair for pair in orders if (pair.source, pair.setting, pair.published_keep, pair.keep) == source]
        counts = (str(sum(pair.verdict == verdict for pair in same)) for verdict in VERDICTS)
        yield f"| {source[0]} | {source[1]} | {source[2]:g}, {source[3]:g} | {' | '.join(counts)} |"
    yield ""
    for verdict in VERDICTS[:3]:
        chosen = sorted((pair for pair in orders if pair.verdict == verdict), key=lambda pair: -abs(pair.difference))
        if chosen:
            yield f"### {verdict.capitalize()}: {len(chosen)}"
            yield ""
            yield "| better, as published | than | keep | published | ours | difference of ours, paired |"
            yield "| --- | --- | ---: | ---: | ---: | ---: |"
            yield from (_line(pair, 3 if forced else 1) for pair in chosen)
            yield ""


def _protected(names: Sequence[str]) -> Iterator[str]:
    """Protected tokens, once for all policies with the same numbers."""
    alike: dict[tuple[int, int], list[str]] = {}
    for name in names:
        policy = load_policy(name)
        if policy.scorer is not None:
            alike.setdefault((policy.sinks, policy.recent), []).append(name)
    for (sinks, recent), policies in sorted(alike.items(), key=lambda item: -len(item[1])):
        which = "every method that evicts" if len(alike) == 1 else ", ".join(policies)
        yield f"Kept in every head, within the budget and of at most half of it: the first {sinks} tokens of a prompt"
        yield f"and the last {recent} ({which})."


def _full(records: Sequence[Record]) -> Iterator[str]:
    """Scores of the full cache."""
    by_task: dict[str, dict[str, list[float]]] = {}
    for record in records:
        if record["policy"] == FULL:
            by_task.setdefault(record["setting"], {}).setdefault(record["task"], []).append(record["score"])
    for setting, tasks in by_task.items():
        means = (f"{task} {sum(scores) / len(scores):.1f}" for task, scores in tasks.items())
        yield f"Full cache, {setting.replace('_', '-')}: {', '.join(means)}."


def _line(pair: Pair, digits: int) -> str:
    published = "{:.1f} : {:.1f}".format(*pair.published)
    ours = " : ".join(f"{value:.{digits}f}" for value in pair.ours)
    aware = ", query-aware" if pair.setting == "query_aware" else ""
    return (
        f"| {pair.better} | {pair.worse}{aware} | {pair.keep:g} | {published} | {ours} | "
        f"{pair.difference:+.{digits}f} ± {pair.stderr:.{digits}f} |"
    )


def _json(report: Mapping[str, Any]) -> str:
    """JSON with a line per row of a table, so that a diff shows the rows that changed."""
    parts = []
    for key, value in report.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if isinstance(value, list) else None
        parts.append(f" {json.dumps(key)}: " + (json.dumps(value) if rows is None else f"[\n{rows}\n ]"))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _job(record: Record) -> tuple[object, ...]:
    return record["policy"], record["keep"], record["budget"]


def head() -> str:
    """The commit that is checked out."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if git.returncode:
        raise UserError("commit=: expected the commit that the comparison was run at, this is not a checkout")
    return git.stdout.strip()
