"""`show=N`: prompts with the expected answers and those of every policy."""

from collections.abc import Iterator, Sequence

from learnkv.evaluation.panels import budget_label
from learnkv.evaluation.results import Record, prompt_key


def shown(records: Sequence[Record], count: int) -> Iterator[str]:
    """Lines about the first `count` prompts of the records."""
    by_prompt: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        by_prompt.setdefault(prompt_key(record), []).append(record)
    for (metric, task, length, setting, index), answers in list(by_prompt.items())[:count]:
        yield f"--- {task}, {length} tokens, {setting}, {metric}, prompt {index}"
        yield f"prompt: {answers[0].get('prompt', '')!r}"
        if answers[0].get("expected") is not None:
            yield f"expected: {', '.join(map(repr, answers[0]['expected']))}"
        for record in answers:
            yield f"  {record['policy']} {budget_label(record)}: {_result(record)}"
        yield ""


def _result(record: Record) -> str:
    kl = f"KL {record['kl']:.4f} nats per token" if "kl" in record else ""
    return " ".join([f"{record['score']:.0f} {record['answer']!r}"] * ("answer" in record) + [kl] * bool(kl))
