"""What a person reads of a study: study.md."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from experiments.study.config import StudyConfig
from experiments.study.criteria import Line
from experiments.study.results import Results, last_validation
from experiments.study.scores import LEARNED, Scores
from experiments.study.variants import facts
from learnkv.evaluation.panels import TITLES, size, table
from learnkv.evaluation.results import Estimate
from learnkv.training.validation import VALIDATION_KEEPS

FINDINGS = "study_findings.md"
COMMAND = "python -m experiments.study"


def page(
    config: StudyConfig, results: Results, criteria: Sequence[Line], commit: str, pictures: Sequence[str]
) -> Iterator[str]:
    """Lines of the page; `pictures` lie beside it."""
    yield "# What learning is worth"
    yield ""
    yield f"Written by `{COMMAND}`, with the keys that study.json has, at commit {commit}, model `{config.model}`."
    yield f"`{results.policy}` is the policy under study; the other `learned-…` are its variants."
    yield ""
    yield "Disjoint from every training: the evaluation's wording, its words, numbers and codes (one split of"
    yield f"`learnkv.data.words`), its haystacks, held-out text, and its prompts, drawn with seed {config.seed}."
    yield "Families of tasks are disjoint only where that is said: trainings with retrieval have facts and chains to"
    yield f"find, in other words (`learnkv.data.retrieval`){''.join(_without(results))}."
    yield ""
    if (Path(config.out) / FINDINGS).is_file():
        yield f"What was learned from it: [{FINDINGS}]({FINDINGS})."
        yield ""
    yield "## What must hold"
    yield ""
    yield "± is one standard error, of paired differences on the same prompts where two policies are compared."
    yield ""
    lines = ([line.about, line.criterion, line.measured, line.verdict] for line in criteria)
    yield from table(["", "criterion", "measured", ""], lines)
    for setting, scores in results.settings.items():
        yield from _setting(results, setting, scores, config)
    if results.text is not None:
        yield from _text(results.text, config.text or "docstrings that nothing is trained on")
    for name, scores in results.out_of_domain.items():
        yield f"## Out of domain: {name}"
        yield ""
        yield from _counted(scores)
        if scores.tasks:
            yield from _comparison(scores, _ordered(scores))
    yield from _trainings(results)
    if pictures:
        yield "## Pictures"
        yield ""
        yield from (f"![{name}]({name})" for name in pictures)


def _without(results: Results) -> Iterator[str]:
    """Which policies saw fewer kinds of tasks in training."""
    if results.unseen is not None:
        yield f"; {results.unseen} has none of it"
    for name, families in results.held_out.items():
        yield f"; {name} has none of {', '.join(families)}"


def _setting(results: Results, setting: str, scores: Scores, config: StudyConfig) -> Iterator[str]:
    yield f"## {TITLES[setting]}"
    yield ""
    yield from _counted(scores)
    if not scores.tasks:
        return
    learned = [name for name in scores.policies if name.startswith(LEARNED)]
    yield from _comparison(scores, _ordered(scores))
    if results.policy not in learned:
        return
    yield f"### {results.policy} minus the others, paired by prompt"
    yield ""
    others = [name for name in _ordered(scores) if name != results.policy]
    yield from table(
        ["minus", *(f"keep {keep:g}" for keep in scores.keeps)],
        ([name, *(_apart(scores, results.policy, name, keep) for keep in scores.keeps)] for name in others),
    )


def _text(text: Scores, source: str) -> Iterator[str]:
    yield f"## Held-out text, {len(text.full)} windows of {source}: KL to the full cache in nats per token"
    yield ""
    yield from table(
        ["policy", *(f"keep {keep:g}" for keep in text.keeps)],
        (
            [name, *(_cell(text, name, keep, 4) for keep in text.keeps)]
            for name in sorted(text.policies, key=lambda name: (not name.startswith(LEARNED), name))
        ),
    )


def _comparison(scores: Scores, names: Iterable[str]) -> Iterator[str]:
    yield "Cells: score ± standard error · percent of the full cache · fraction of entries kept · bytes per prompt."
    yield ""
    body = []
    for name in names:
        cells = [scores.cells[name, keep] for keep in scores.keeps if (name, keep) in scores.cells]
        counts = sorted({count for cell in cells for count in Counter(one["task"] for one in cell).values()})
        prompts = f"{counts[0]}-{counts[-1]}" if counts[1:] else str(counts[0])
        body.append([name, prompts, *(_full_cell(scores, name, keep) for keep in scores.keeps)])
    yield from table(["policy", "prompts per task", *(f"keep {keep:g}" for keep in scores.keeps)], body)


def _counted(scores: Scores) -> Iterator[str]:
    """Which tasks count, and what the full cache has."""
    by_task: dict[str, list[float]] = {}
    for record in scores.full.values():
        by_task.setdefault(record["task"], []).append(record["score"])
    full = ", ".join(f"{task} {fmean(by_task[task]):.1f}" for task in scores.tasks)
    if full:
        yield f"Means over {len(scores.tasks)} tasks; the full cache has {full}."
    if scores.left_out:
        yield "Left out, because the full cache itself scores too low: "
        yield ", ".join(f"{task} {score:.1f}" for task, score in scores.left_out.items()) + "."
    yield ""


def _trainings(results: Results) -> Iterator[str]:
    """What every training was, and what it logged at its end."""
    if not results.runs:
        return
    yield "## Trainings"
    yield ""
    yield "KL in nats per token on validation prompts, deployed set and (soft gates); changed: kept entries that the"
    yield "heuristic below the policy evicts; spread: standard deviation over heads of what one more entry is worth."
    yield ""
    body = []
    for name, run in results.runs.items():
        keys, last = facts(run), last_validation(run)
        cells = [
            "{learned_kl:.3f} ({soft_kl:.3f}), changed {changed:.2f}, spread {marginal_spread:.2g}".format(
                **{key: last[f"val/{key}@{keep:g}"] for key in ("learned_kl", "soft_kl", "changed", "marginal_spread")}
            )
            if f"val/marginal_spread@{keep:g}" in last
            else ""
            for keep in VALIDATION_KEEPS
        ]
        objective = (keys["objective"] or {"class_path": "ForwardKL"})["class_path"].split(".")[-1]
        lengths = "-".join(map(str, keys["lengths"] or ())) or "default"
        body.append([name, f"{objective}, {keys['trainer']['max_steps']} steps, lengths {lengths}", *cells])
    yield from table(["policy", "training", *(f"keep {keep:g}" for keep in VALIDATION_KEEPS)], body)


def _ordered(scores: Scores) -> list[str]:
    """Learned policies, then the others by their mean."""

    def place(name: str) -> tuple[bool, float]:
        mean = fmean(scores.of(name, keep).mean for keep in scores.keeps if (name, keep) in scores.cells)
        return not name.startswith(LEARNED), -mean

    return sorted(scores.policies, key=place)


def _full_cell(scores: Scores, name: str, keep: float) -> str:
    if (name, keep) not in scores.cells:
        return ""
    spent, held = scores.mean_of(name, keep, "spent"), size(scores.mean_of(name, keep, "bytes"))
    return f"{_cell(scores, name, keep)} · {scores.retained(name, keep).mean:.0f} % · {spent:.3f} · {held}"


def _cell(scores: Scores, name: str, keep: float, digits: int = 1) -> str:
    return _pm(scores.of(name, keep), "", digits) if (name, keep) in scores.cells else ""


def _apart(scores: Scores, name: str, other: str, keep: float) -> str:
    if not {(name, keep), (other, keep)} <= scores.cells.keys():
        return ""
    return _pm(scores.minus(name, other, keep), "+")


def _pm(one: Estimate, sign: str = "", digits: int = 1) -> str:
    return f"{one.mean:{sign}.{digits}f} ± {one.stderr:.{digits}f}"
