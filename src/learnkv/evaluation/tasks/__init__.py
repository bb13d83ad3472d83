"""Task families, one file each, selected by `tasks=`."""

from collections.abc import Iterator
from typing import Any

from datasets.exceptions import DatasetsError

from learnkv.data.ruler import NEEDLES, TASKS
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.fidelity import TASK as FIDELITY
from learnkv.evaluation.tasks import fidelity, ruler, suite, table, text
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.base import Family, Prompt
from learnkv.evaluation.tasks.forced import Forced
from learnkv.evaluation.tasks.suites import SUITES, suite_names, suites_named
from learnkv.evaluation.tasks.table_files import is_file
from learnkv.evaluation.tasks.text import Text
from learnkv.persistence.named_configs import nearest

ON_TEXT = ("text", FIDELITY)
"""Tasks without a question."""

__all__ = ["Answers", "Family", "Forced", "Prompt", "Text", "load"]


def load(config: EvalConfig, tokenizer: Any, context: int | None) -> list[Family]:
    """All prompts of a comparison, by family, length and setting.

    Args:
        context: longest prompt of the model in tokens, None if it has no limit.

    Raises:
        UserError: an unknown task, a source that cannot be read, a length above the model's context.
    """
    _check(config, context)
    try:
        families = [family for length in config.lengths for family in _families(config, length, tokenizer)]
    except UserError:
        raise
    except (ValueError, OSError, DatasetsError, StopIteration) as error:  # from the data
        reason = str(error.__cause__ or error).split("\n")[0] or "expected text, the file has none"
        source = f"text={config.text}: " if "text" in config.tasks and str(config.text) not in reason else ""
        raise UserError(source + reason) from error
    for prompt in (prompt for family in families for prompt in family.prompts):
        if context is not None and prompt.room > context:
            raise UserError(
                f"{prompt.task}: prompt {prompt.index} has {prompt.room} tokens with room for the answer, "
                f"the model's context is {context}"
            )
    return families


def _check(config: EvalConfig, context: int | None) -> None:
    """UserError for a task or a length that cannot be measured."""
    available = [*TASKS, *ruler.GROUPS, *ON_TEXT, *suite_names()]
    for name in config.tasks:
        if name not in available and not table.is_table(name):
            expected = f"a table or one of: {', '.join([*TASKS, *ruler.GROUPS, *ON_TEXT, *SUITES])}"
            raise UserError(f"tasks={name}: expected {expected}{nearest(name, available)}")
    _check_haystack(config)
    if any(map(is_file, config.tasks)) and len(config.lengths) > 1:
        raise UserError(f"lengths={','.join(map(str, config.lengths))}: a table has one length, expected one")
    for length in config.lengths:
        if context is not None and length > context:
            raise UserError(f"lengths={length}: expected at most {context}, the model's context")


def _check_haystack(config: EvalConfig) -> None:
    """UserError for a haystack that none of the tasks reads: scores would be taken for scores on it."""
    reading = [task for task, needles in NEEDLES.items() if needles.haystack == "essay"]
    reading += [name for chosen in SUITES.values() if chosen.essays for name in (chosen.name, *chosen.tasks)]
    if config.haystack and not {*reading} & {*config.tasks, *ruler.tasks_named(config.tasks, config.qa)}:
        given = ",".join(config.tasks)
        raise UserError(f"haystack={config.haystack}: read by {', '.join(reading)}, got tasks={given}")


def _families(config: EvalConfig, length: int, tokenizer: Any) -> list[Family]:
    """The families of one length: questions by setting and by what measures them, then text."""
    measured: dict[tuple[str, type[Answers]], list[Prompt]] = {}
    for kind, prompts in _questions(config, length, tokenizer):
        for prompt in prompts:
            measured.setdefault((prompt.setting, kind), []).append(prompt)
    groups = sorted(measured.items(), key=lambda group: config.setting.index(group[0][0]))
    families: list[Family] = [kind(prompts, tokenizer) for (_, kind), prompts in groups]
    if "text" in config.tasks:
        families.append(Text(text.prompts(config, length, tokenizer), tokenizer))
    if FIDELITY in config.tasks:
        families.append(fidelity.Fidelity(fidelity.prompts(config, length, tokenizer), tokenizer))
    return families


def _questions(config: EvalConfig, length: int, tokenizer: Any) -> Iterator[tuple[type[Answers], list[Prompt]]]:
    """Prompts with a question, and what measures them."""
    plain = suite.Suite.families[config.score]
    tables = [name for name in config.tasks if table.is_table(name)]
    generated = [name for name in config.tasks if name not in (*tables, *ON_TEXT, *suite_names())]
    yield plain, ruler.prompts(config, ruler.tasks_named(generated, config.qa), length, tokenizer)
    for source in tables:
        yield plain, table.prompts(config, source, length, tokenizer)
    for chosen, names in suites_named(config.tasks, config).items():
        yield chosen.families[config.score], suite.prompts(config, chosen, names, length, tokenizer)
