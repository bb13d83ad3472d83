"""Task families, one file each, and which of them `tasks=` names."""

from typing import Any

from learnkv.data.ruler import TASKS
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks import ruler, table, text
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.base import Family, Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.persistence.named_configs import nearest

__all__ = ["Answers", "Family", "Prompt", "Text", "load"]


def load(config: EvalConfig, tokenizer: Any, context: int | None) -> list[Family]:
    """All prompts that `config` asks for, by family, length and setting.

    Args:
        context: longest prompt of the model in tokens, None if it has no limit.

    Raises:
        UserError: an unknown task, a source that cannot be read, a length that the model does not have.
    """
    tables = [name for name in config.tasks if table.is_table(name)]
    ours = [name for name in config.tasks if name not in (*tables, "text")]
    known = [*TASKS, *ruler.GROUPS, "text"]
    for name in ours:
        if name not in known:
            raise UserError(f"tasks={name}: expected a table or one of: {', '.join(known)}{nearest(name, known)}")
    if any(map(table.is_file, tables)) and len(config.lengths) > 1:
        raise UserError(f"lengths={','.join(map(str, config.lengths))}: a table has one length, expected one")
    for length in config.lengths:
        if context is not None and length > context:
            raise UserError(f"lengths={length}: expected at most {context}, the model's context")
    families: list[Family] = []
    try:
        for length in config.lengths:
            found = ruler.prompts(config, ruler.tasks_named(ours, config.qa), length, tokenizer)
            for source in tables:
                found += table.prompts(config, source, length, tokenizer)
            for setting in config.setting:
                if chosen := [prompt for prompt in found if prompt.setting == setting]:
                    families.append(Answers(chosen, tokenizer))
            if "text" in config.tasks:
                families.append(Text(text.prompts(config, length, tokenizer)))
    except UserError:
        raise
    except (ValueError, OSError) as error:  # from the data, whose errors are one line already
        raise UserError(str(error).split("\n")[0]) from error
    for prompt in (prompt for family in families for prompt in family.prompts):
        if context is not None and prompt.room > context:
            raise UserError(
                f"{prompt.task}: prompt {prompt.index} has {prompt.room} tokens with room for the answer, "
                f"the model's context is {context}"
            )
    return families
