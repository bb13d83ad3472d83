"""study.md of a study that lists its comparisons."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from experiments.study.comparison import Comparison
from experiments.study.config import NAME, StudyConfig, name_of, ships
from experiments.study.criteria import Line
from experiments.study.listed.criteria import Measured
from experiments.study.listed.kl import exact_scores, kl_scores
from experiments.study.page import COMMAND
from experiments.study.scores import LEARNED, Scores
from learnkv.evaluation.panels import plus_minus, size, table
from learnkv.evaluation.results import FULL, Record


def page(measured: Measured, criteria: Sequence[Line], commit: str, pictures: Sequence[str]) -> Iterator[str]:
    """Lines of the page; `pictures` lie beside it."""
    config = measured.config
    yield f"# The study on {config.model}"
    yield ""
    named = config.model if config.name == NAME else f"{config.model}-{config.name}"
    yield f"Written by `{COMMAND} config={named}` at commit {commit}; all keys are in {config.name}.json."
    yield f"`{measured.policy}` {_origin(config.learned)}."
    if config.unseen is not None:
        yield f"`{name_of(config.unseen)}` {_origin(config.unseen)} and never saw a retrieval episode."
    yield ""
    yield "Forced: the correct answer is read behind the question, in one pass. KL is that from the full cache, in nats"
    yield "per token of the answer; exact is the percentage of prompts whose every answer token is ranked first."
    yield "Generated: the answer is generated and scored as RULER does. Tables have one of the two; query-agnostic and"
    yield "query-aware results are never in one table. ± is one standard error, of paired differences where policies"
    yield "are compared."
    yield ""
    if config.in_bytes:
        yield from _about_bytes(config)
    yield "Disjoint from every training: the evaluation's wording, its words, numbers and codes (one split of"
    yield "`learnkv.data.words`), its haystacks, its books, and its prompts, drawn with seeds that no training uses."
    yield ""
    findings = f"{config.name}_findings.md"
    if (Path(config.out) / findings).is_file():
        yield f"What was learned from it: [{findings}]({findings})."
        yield ""
    yield "## What must hold"
    yield ""
    yield from table(
        ["", "criterion", "measured", ""],
        ([line.about, line.criterion, line.measured, line.verdict] for line in criteria),
    )
    for name, comparison in config.comparisons.items():
        if measured.records.get(name):
            yield from _comparison(measured, name, comparison)
    if pictures:
        yield "## Pictures"
        yield ""
        yield from (f"![{name}]({name})" for name in pictures)


def _origin(variant: str) -> str:
    return f"ships as `--ckpt {variant}`" if ships(variant) else f"is what `train.py config={variant}` trains"


def _about_bytes(config: StudyConfig) -> Iterator[str]:
    yield "A budget is a part of the bytes of a prompt's keys and values at 16 bits. Codes, scales, zeros, positions"
    yield "and tables count, as they are held right after compression. `kvzip@4` ranks entries as kvzip does and has"
    yield "them in 4 bits, `full@4` keeps every entry."
    if config.uniform is not None:
        yield f"`{name_of(config.uniform)}@4` has learned scores and budgets at a uniform precision."
    yield ""


def _comparison(measured: Measured, name: str, comparison: Comparison) -> Iterator[str]:
    """A heading, the tasks, and a table for every setting and length."""
    settings = {(one["setting"], one["length"]) for one in measured.records[name]}
    for setting, length in sorted(settings):
        records = [one for one in measured.records[name] if (one["setting"], one["length"]) == (setting, length)]
        kind = "held-out text" if comparison.tasks == ("text",) else comparison.score
        yield f"## {name}: {setting.replace('_', '-')}, {length:,} tokens, {kind}"
        yield ""
        yield f"{_tasks(records)}, seed {comparison.seed}{_different(comparison)}."
        yield ""
        if comparison.score == "generated":
            yield from _table(exact_scores(records, measured.config), None)
        else:
            exact = None if comparison.tasks == ("text",) else exact_scores(records, measured.config)
            if exact is not None and exact.left_out:
                yield f"Exactness without {', '.join(exact.left_out)}: the full cache does not answer exactly there."
                yield ""
            yield from _table(kl_scores(records, measured.config), exact if exact is not None and exact.tasks else None)


def _tasks(records: Sequence[Record]) -> str:
    """Tasks with their prompts and what the full cache scores."""
    full: dict[str, list[float]] = {}
    for one in records:
        if one["policy"] == FULL:
            full.setdefault(one["task"], []).append(one["score"])
    if list(full) == ["text"]:
        return f"{len(full['text'])} windows"
    return "Full cache: " + ", ".join(f"{task} {fmean(scores):.0f} % of {len(scores)}" for task, scores in full.items())


def _different(comparison: Comparison) -> str:
    """What is not as in the other comparisons."""
    default = Comparison()
    found = [
        f"{key} {getattr(comparison, key)}"
        for key in ("template", "keys", "haystack")
        if getattr(comparison, key) != getattr(default, key)
    ]
    return "".join(f", {one}" for one in found)


def _table(scores: Scores, exact: Scores | None) -> Iterator[str]:
    """A row per policy, the best first: value (exact %) and the bytes that a prompt's entries take."""
    unit = "score" if scores.value == "score" else "KL" if exact is None else "KL (exact %)"
    head = [unit, "prompts", *(f"{scores.unit} {keep:g}" for keep in scores.keeps)]
    yield from table(
        head,
        (
            [name, _prompts(scores, name), *(_cell(scores, exact, name, keep) for keep in scores.keeps)]
            for name in _ordered(scores)
        ),
    )
    for name, records in scores.whole.items():
        part = fmean(one["bytes"] / one["bytes_full"] for one in records)
        value = plus_minus(scores.of_whole(name), "", 1 if scores.value == "score" else 4)
        yield f"{name} keeps every entry, in {100 * part:.1f} % of the bytes: {unit.split(' ')[0]} {value}."
        yield ""


def _prompts(scores: Scores, name: str) -> str:
    """Prompts per task, the fewest and the most where they differ."""
    cells = [scores.cells[name, keep] for keep in scores.keeps if (name, keep) in scores.cells]
    counts = sorted({count for cell in cells for count in Counter(one["task"] for one in cell).values()})
    return f"{counts[0]}-{counts[-1]}" if counts[1:] else str(counts[0])


def _cell(scores: Scores, exact: Scores | None, name: str, keep: float) -> str:
    if (name, keep) not in scores.cells:
        return ""
    digits = 1 if scores.value == "score" else 4
    answers = "" if exact is None else f" ({exact.of(name, keep).mean:.0f} %)"
    return f"{plus_minus(scores.of(name, keep), '', digits)}{answers} · {size(scores.mean_of(name, keep, 'bytes'))}"


def _ordered(scores: Scores) -> list[str]:
    """Learned policies, then the others, the best first."""
    better = -1 if scores.value == "score" else 1

    def place(name: str) -> tuple[bool, float]:
        means = [scores.of(name, keep).mean for keep in scores.keeps if (name, keep) in scores.cells]
        return not name.startswith(LEARNED), better * fmean(means)

    return sorted(scores.policies, key=place)
