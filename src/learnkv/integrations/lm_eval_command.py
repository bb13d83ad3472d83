"""`learnkv lm-eval model_args=… tasks=…`: tasks of lm-evaluation-harness with a compressed cache."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from learnkv.errors import UserError
from learnkv.formats.files import write_text
from learnkv.persistence.named_configs import nearest


@dataclass(frozen=True)
class LmEvalConfig:
    """Run tasks of lm-evaluation-harness with a compressed cache.

    Args:
        model_args: model, policy and budget with commas between them, as in pretrained=PATH,policy=snapkv,keep=0.1.
        tasks: names of lm-eval's tasks or groups, or patterns of them.
        include_path: folder with YAML files of further tasks.
        num_fewshot: examples before every question; default: the task's.
        limit: documents per task, or a fraction of them.
        batch_size: contexts that are read at once, and then continuations.
        gen_kwargs: settings of generation, with commas between them, in place of the task's.
        apply_chat_template: put the model's chat template around every context.
        system_instruction: system message.
        log_samples: write every document with its answers to samples-TASK.jsonl.
        output: folder for results.json; none: the table is printed only.
    """

    model_args: str = ""
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    batch_size: int = 8
    gen_kwargs: str | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    log_samples: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        if not self.model_args or not all("=" in part for part in self.model_args.split(",")):
            raise UserError(f"model_args={self.model_args}: expected pretrained=MODEL,policy=NAME,keep=FRACTION")
        if not self.tasks:
            raise UserError("tasks=: expected names of lm-eval's tasks, got none")
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise UserError(f"include_path={self.include_path}: expected a folder")
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"limit={self.limit:g}: expected documents per task, or a fraction of them")
        if self.log_samples and self.output is None:
            raise UserError("log_samples=true: expected output=FOLDER for the samples, got none")


def run_tasks(config: LmEvalConfig, resolved: str) -> None:
    """Run the tasks, print lm-eval's table and write its results.

    Raises:
        UserError: without lm-eval, for a task that it does not know, and for what `CompressedLM` refuses.
    """
    import learnkv.integrations.lm_eval  # registers the model
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table

    limit = config.limit if config.limit is None or config.limit < 1 else int(config.limit)
    results = simple_evaluate(
        model="learnkv",
        model_args=config.model_args,
        tasks=list(config.tasks),
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        limit=limit,
        gen_kwargs=config.gen_kwargs,
        apply_chat_template=config.apply_chat_template,
        system_instruction=config.system_instruction,
        log_samples=config.log_samples,
        task_manager=_task_manager(config.tasks, config.include_path),
    )
    if config.output is not None:
        _write(Path(config.output).expanduser(), dict(results), resolved)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def _task_manager(tasks: Sequence[str], include_path: str | None) -> Any:
    """An index that has all of the tasks; lm-eval's own, which takes long to read, only where it is needed."""
    from lm_eval.tasks import TaskManager

    unknown, names = list(tasks), list[str]()
    for defaults in (False, True) if include_path is not None else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        names = list(manager.all_tasks)
        unknown = [task for task in tasks if not any(fnmatch(name, task) for name in names)]
        if not unknown:
            return manager
    raise UserError(f"tasks={unknown[0]}: not a task of lm-eval{nearest(unknown[0], names)}")


def _write(folder: Path, results: dict[str, Any], resolved: str) -> None:
    """The resolved keys, lm-eval's results, and samples where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in (results.pop("samples", None) or {}).items():
        write_text(folder / f"samples-{task}.jsonl", "".join(json.dumps(one, default=str) + "\n" for one in samples))
    write_text(folder / "config.yaml", resolved)
    write_text(folder / "results.json", json.dumps(results, indent=1, default=str) + "\n")
