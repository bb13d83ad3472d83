"""`learnkv eval --ckpt PATH [config=…] [key=value …]`: compare compression policies on one model."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from learnkv.errors import RunError, UserError
from learnkv.evaluation import pictures, report, runner, tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.results import FULL, Record, rows_of
from learnkv.evaluation.store import Store, replacing
from learnkv.inference.attention import attach
from learnkv.inference.models import context_length, describe_model, load_model
from learnkv.persistence.policies import describe_policy_file, load_policy
from learnkv.policy.policy import Policy


def evaluate(config: EvalConfig, resolved: str) -> None:
    """Run a comparison and write `config.yaml`, `samples.jsonl`, `results.json`, `results.md` and pictures.

    The report is written too when the run is interrupted, from what is finished by then.
    """
    for path in config.ckpt:
        load_policy(path, config.allow)  # what is missing is told before a large model is loaded
    model, tokenizer = load_model(config.model, config.revision, config.dtype, config.device, config.attn)
    attach(model)
    policies = load_policies(config, model)
    families = tasks.load(config, tokenizer, context_length(model))
    output = Path(config.output).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"output={config.output}: expected a folder that can be written ({error})") from None
    with replacing(output / "config.yaml") as part:
        part.write_text(resolved, encoding="utf-8")
    jobs = runner.jobs_of(model, policies, config.budgets)
    store = Store(output / "samples.jsonl")
    try:
        runner.run(model, families, jobs, store, config.batch_size)
    except (KeyboardInterrupt, RunError):
        if done := runner.finished(families, jobs, store):
            write_report(output, model, policies, done)
        raise
    write_report(output, model, policies, runner.finished(families, jobs, store))


def load_policies(config: EvalConfig, model: Any) -> dict[str, Policy]:
    """Every policy that `config.ckpt` names, by the name it has in tables; the full cache is always compared to."""
    found: dict[str, Policy] = {}
    for path in dict.fromkeys(config.ckpt):
        policy = load_policy(path, config.allow, describe_model(model)).to(model.device)
        name = describe_policy_file(path)
        if name == FULL:
            continue
        if name in found:
            raise UserError(f"ckpt={path}: a second policy that is called {name}, expected files of different names")
        found[name] = policy
    return found


def write_report(output: Path, model: Any, policies: Mapping[str, Policy], records: Sequence[Record]) -> None:
    """Results for machines and for people, each file replaced in one step."""
    rows = rows_of(records)
    name = describe_model(model)["id"]
    result = {"schema": 1, "model": name, "environment": environment(model), "rows": rows}
    with replacing(output / "results.json") as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with replacing(output / "results.md") as part:
        part.write_text(report.markdown(name, rows, records, runner.starting_points(policies)), encoding="utf-8")
    figures = {"pareto.png": pictures.pareto(rows)} if rows else {}
    figures |= {f"heatmap-{policy}.png": found for policy in policies if (found := pictures.heatmap(records, policy))}
    for file, figure in figures.items():
        pictures.save(figure, output / file)
    print((output / "results.md").read_text(encoding="utf-8").split(report.EVERY_TASK)[0])
    print("\n".join(str(output / file) for file in ("results.json", "results.md", *figures)))


def environment(model: Any) -> dict[str, str]:
    """What else a result depends on."""
    versions = {}
    for package in ("learnkv", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    return {"python": platform.python_version(), **versions, "device": device, "dtype": dtype}
