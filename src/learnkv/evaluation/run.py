"""`learnkv eval --ckpt PATH [config=…] [key=value …]`: compare compression policies on one model."""

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from learnkv.errors import RunError, UserError
from learnkv.evaluation import pictures, report, runner, tasks
from learnkv.evaluation.accepted import check_drafts
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.fidelity import fidelity_report
from learnkv.evaluation.folder import CONFIG, check_folder, evaluation_folder
from learnkv.evaluation.html.page import REPORT, Contents, write_page
from learnkv.evaluation.jobs import Job, jobs_of
from learnkv.evaluation.leaderboard import leaderboard, text_of
from learnkv.evaluation.needle_pictures import needle_maps
from learnkv.evaluation.precisions import at_precisions, without_precision
from learnkv.evaluation.processes import Processes, processes, reporting
from learnkv.evaluation.provenance import commit, template_hash
from learnkv.evaluation.results import FULL, SCHEMA, Record, rows_of
from learnkv.evaluation.show import shown
from learnkv.evaluation.store import Store
from learnkv.evaluation.tabled import tabled
from learnkv.evaluation.tasks.suite import cut_notes
from learnkv.evaluation.typed_command import typed_command
from learnkv.evaluation.written_answers import written_answers
from learnkv.formats.files import write_text
from learnkv.inference.attention import attach
from learnkv.inference.fingerprint import describe_with_weights
from learnkv.inference.models import context_length, describe_model, load_model
from learnkv.persistence.methods import kinds_of, select_methods
from learnkv.persistence.policies import describe_policy_file, load_policy
from learnkv.policy.policy import Policy

SAMPLES = "samples.jsonl"


def evaluate(config: EvalConfig, resolved: str) -> None:
    """Run a comparison and write its configuration, samples, tables, pictures and page.

    A second evaluation into a folder adds its rows to the table. An interrupted run writes a report of its finished
    samples, and the same command continues it, with any number of processes.
    """
    with processes(config.devices, assist, config) as group:
        if group.is_first:
            _evaluate(config, resolved, group)
        else:
            assist(config, group)


def assist(config: EvalConfig, group: Processes) -> None:
    """Measure a share of the batches, on a process that is not the first."""
    with reporting(group):
        prepared = _prepare(config, group)
        store = Store(Path(config.output).expanduser() / SAMPLES, group.shard)
        runner.run(prepared.model, prepared.families, prepared.jobs, store, prepared.packing, group, config.viewer)


def _evaluate(config: EvalConfig, resolved: str, group: Processes) -> None:
    check_folder(config.output)
    if config.wandb is not None:  # what is missing is an error before a large model is loaded
        from learnkv.evaluation import wandb_log
    for path in policy_paths(config):
        _load(path, config)  # a missing file is an error before a large model is loaded
    model, tokenizer, policies, families, jobs, packing = _prepare(config, group)
    with evaluation_folder(config.output) as output:
        write_text(output / CONFIG, resolved)
        command = typed_command("learnkv eval", config)
        store = Store(output / SAMPLES, group.shard)
        try:
            skipped = runner.run(model, families, jobs, store, packing, group, config.viewer)
        except (KeyboardInterrupt, RunError):
            store.read()
            if runner.finished(families, jobs, store):
                write_report(output, model, policies, tabled(families, jobs, store), tokenizer, command=command)
            done = sum(job.fingerprint(prompt) in store for job in jobs for f in families for prompt in f.prompts)
            print(f"{done:,} samples are stored in {output}: the same command continues", file=sys.stderr)
            raise
        if group.count > 1:
            store.merge()
        records = tabled(families, jobs, store)
        rows, board = write_report(output, model, policies, records, tokenizer, skipped, command)
        if config.wandb is not None:
            wandb_log.log(config.wandb, output, yaml.safe_load(resolved), rows, board)
        if config.gate is not None:
            config.gate.check(rows)
        print("\n".join(shown(records, config.show)), end="")


class _Prepared(NamedTuple):
    """What every process has before it measures."""

    model: Any
    tokenizer: Any
    policies: Mapping[str, Policy]
    families: Sequence[tasks.Family]
    jobs: Sequence[Job]
    packing: Packing


def _prepare(config: EvalConfig, group: Processes) -> _Prepared:
    device = group.device(config.device)
    model, tokenizer = load_model(config.model, config.revision, config.dtype, device, config.attn)
    attach(model)
    policies = load_policies(config, model)
    families = tasks.load(config, tokenizer, context_length(model))
    check_drafts(config.draft_tokens, families)
    jobs = jobs_of(model, policies, config.budgets, config.draft_tokens)
    packing = Packing.of_keys(config.batch_size, config.batch_tokens, config.answers)
    return _Prepared(model, tokenizer, policies, families, jobs, packing)


def policy_paths(config: EvalConfig) -> list[str]:
    """Paths and names of the policies to compare, each once."""
    return list(dict.fromkeys((*config.ckpt, *select_methods(config.baselines))))


def load_policies(config: EvalConfig, model: Any) -> dict[str, Policy]:
    """The policies of `ckpt` and `baselines` by their names in tables, without the full cache, which is always run.

    Baselines without training are at the precisions of `precision`, where there are some, and with them the full cache.
    """
    described = describe_with_weights(model)
    loaded: dict[str, Policy] = {}
    for path in policy_paths(config):
        name, policy = _load(path, config, described)
        policy = policy.to(model.device)
        if name == FULL:
            continue
        if name in loaded:
            raise UserError(f"ckpt={path}: a second policy that is called {name}, expected files of different names")
        loaded[name] = policy
    return _at_precisions(config, loaded, load_policy(FULL).to(model.device)) if config.precision else loaded


def _load(path: str, config: EvalConfig, described: Mapping[str, Any] | None = None) -> tuple[str, Policy]:
    """A policy with its name in tables, at the precision that follows its path if one does."""
    file, precision = without_precision(path)
    name, policy = describe_policy_file(file), load_policy(file, config.allow, described)
    return (name, policy) if precision is None else at_precisions({name: policy}, [precision]).popitem()


def _at_precisions(config: EvalConfig, loaded: Mapping[str, Policy], whole: Policy) -> dict[str, Policy]:
    """The policies as they are, without the baselines that have no training: these, and `whole`, at every precision."""
    alone = {name for name in loaded if "@" in name} | set(map(describe_policy_file, config.ckpt))
    baselines = set(map(describe_policy_file, select_methods(config.baselines)))
    uniform = {name: each for name, each in loaded.items() if name in baselines and "trained" not in kinds_of(each)}
    others = {name: each for name, each in loaded.items() if name in alone or name not in uniform}
    return {**others, **at_precisions({FULL: whole, **uniform}, config.precision)}


def write_report(
    output: Path,
    model: Any,
    policies: Mapping[str, Policy],
    records: Sequence[Record],
    tokenizer: Any,
    skipped: Sequence[str] = (),
    command: str = "",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write `results.json`, `results.md`, `leaderboard.csv`, `report.html` and pictures, each replaced in one step.

    Args:
        skipped: lines about prompts that did not fit in memory.
        command: that was typed.

    Returns:
        Rows of the results and of the leaderboard.
    """
    rows = rows_of(records)
    name = describe_model(model)["id"]
    notes = [f"{policy}: {made.other_weights}" for policy, made in policies.items() if made.other_weights]
    notes += cut_notes(record for record in records if record["policy"] == FULL)
    notes += skipped
    conditions = environment(model, tokenizer)
    result = {"schema": SCHEMA, "model": name, "environment": conditions, "notes": notes, "rows": rows}
    write_text(output / "results.json", json.dumps(result, indent=1) + "\n")
    board = leaderboard(name, conditions, rows)
    write_text(output / "leaderboard.csv", text_of(board))
    text = report.markdown(name, rows, records, runner.baselines_of(policies))
    text = "\n".join([text, *written_answers(records), *fidelity_report(rows)]).rstrip("\n") + "\n"
    write_text(output / "results.md", "\n\n".join([text.rstrip("\n"), *notes]) + "\n" if notes else text)
    figures = {"pareto.png": pictures.pareto(rows)} if rows else {}
    names = dict.fromkeys(record["policy"] for record in records)
    heatmaps = {name: pictures.heatmap(records, name) for name in names}
    figures |= {f"heatmap-{name}.png": figure for name, figure in heatmaps.items() if figure is not None}
    figures |= needle_maps(records)
    for file, figure in figures.items():
        pictures.save(figure, output / file)
    config = output / CONFIG
    about = Contents(
        title=f"Compressed caches of {name}",
        model=name,
        environment=conditions,
        records=records,
        rows=rows,
        notes=notes,
        command=command,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
    )
    write_page(output / REPORT, about)
    tables = (output / "results.md").read_text(encoding="utf-8")
    print(tables.split(report.EVERY_TASK)[0].split(report.COSTS)[0])
    print("\n".join(str(output / file) for file in ("results.json", "results.md", REPORT, *figures)))
    return rows, board


def environment(model: Any, tokenizer: Any) -> dict[str, str]:
    """Versions, code, chat template, device and dtype that results depend on."""
    versions = {}
    for package in ("learnkv", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    code = {"commit": commit(), "chat_template": template_hash(tokenizer)}
    return {"python": platform.python_version(), **versions, "device": device, "dtype": dtype, **code}
