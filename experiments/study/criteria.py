"""What must hold of a trained policy, line by line: the bar, what was measured, whether it is met."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from experiments.study.results import Evidence, last_validation
from experiments.study.scores import Scores
from learnkv.evaluation.results import Estimate

Verdict = Literal["met", "missed", "not measured", "reported"]
RETAINED = {0.1: 95.0, 0.05: 85.0}
NEARLY_FULL = 97.0
CLEAR = 2.0
TEXT_RATIO = {0.25: 0.5, 0.1: 0.5}
RIVAL = "kvzip"
"""The strongest method without training, which reads every prompt twice."""
LOGGED = ("gap", "changed", "marginal_spread")
DRAWN = ("validation.png", "marginal.png", "marginal.csv")


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    about: str
    bar: str
    measured: str
    verdict: Verdict


def lines(found: Evidence) -> Iterator[Line]:
    """Every line, in the order in which they were set."""
    agnostic, aware = (found.settings.get(f"query_{one}") for one in ("agnostic", "aware"))
    if agnostic is not None or found.text is None:  # there are tasks
        yield from (retains(found.judged, agnostic, keep, bar) for keep, bar in RETAINED.items())
    if agnostic is not None:
        yield from (beats_all(found.judged, agnostic, keep) for keep in agnostic.keeps)
    if aware is not None:
        yield from (is_among_the_best(found.judged, aware, keep) for keep in aware.keeps)
    for keep, bar in TEXT_RATIO.items():
        yield loses_less_text(found.judged, found.text, keep, bar)
    for name, keep in found.single.items():
        yield serves_all_budgets(found.judged, name, agnostic, keep)
    yield from conditioning_counts(found)
    yield from families_held_out(found)
    yield from generalises(found)
    yield logs_and_draws(found)


def retains(judged: str, scores: Scores | None, keep: float, bar: float) -> Line:
    """Percent of the full cache's score."""
    about, limit = f"query-agnostic, keep {keep:g}: score beside the full cache", f"≥ {bar:g} %"
    if scores is None or (judged, keep) not in scores.cells:
        return Line(about, limit, "", "not measured")
    own = scores.retained(judged, keep)
    return Line(about, limit, f"{_pm(own)} %", _met(own.mean >= bar))


def beats_all(judged: str, scores: Scores, keep: float) -> Line:
    """Above every method without training by more than two paired standard errors, or nearly full."""
    about = f"query-agnostic, keep {keep:g}: above every method without training"
    limit = f"by more than {CLEAR:g} SE, or ≥ {NEARLY_FULL:g} % of full"
    rivals = scores.rivals(keep)
    if (judged, keep) not in scores.cells or not rivals:
        return Line(about, limit, "", "not measured")
    apart = {rival: scores.minus(judged, rival, keep) for rival in rivals}
    short = [rival for rival, one in apart.items() if not _above(one)]
    worst = min(apart, key=lambda rival: _in_errors(apart[rival]))
    own = scores.retained(judged, keep)
    told = f"{_pm(apart[worst], '+')} over {worst}; {own.mean:.1f} % of full"
    if short:
        told += f"; not clearly above {', '.join(short[:4])}{' and others' if len(short) > 4 else ''}"
    told += _beside_trained(judged, scores, keep)
    return Line(about, limit, told, _met(not short or own.mean >= NEARLY_FULL))


def is_among_the_best(judged: str, scores: Scores, keep: float) -> Line:
    """At or above the best method, trained or not, within one paired standard error."""
    about = f"query-aware, keep {keep:g}: at or above the best method"
    if (judged, keep) not in scores.cells or not scores.rivals(keep):
        return Line(about, "within 1 SE", "", "not measured")
    rival, apart = scores.nearest(judged, keep)
    told = f"{_pm(apart, '+')} over {rival}{_beside_trained(judged, scores, keep)}"
    every = [scores.minus(judged, other, keep) for other in scores.others(keep)]
    return Line(about, "within 1 SE", told, _met(all(one.mean >= -_error(one) for one in every)))


def loses_less_text(judged: str, text: Scores | None, keep: float, bar: float) -> Line:
    """KL over that of the best method without training."""
    about, limit = f"held-out text, keep {keep:g}: KL over the best method's without training", f"≤ {bar:g}"
    if text is None or (judged, keep) not in text.cells or not text.rivals(keep):
        return Line(about, limit, "", "not measured")
    best = text.rivals(keep)[0]
    ratio = text.ratio(judged, best, keep)
    own = text.of(judged, keep).mean
    told = f"{ratio:.2f} ({own:.4f} nats per token) of {best}"
    if trained := text.rivals(keep, trained=True):
        told += f"; {text.ratio(judged, trained[0], keep):.2f} of {trained[0]} (trained)"
    return Line(about, limit, told, _met(ratio <= bar))


def serves_all_budgets(judged: str, single: str, scores: Scores | None, keep: float) -> Line:
    """Not worse than a policy trained for this budget alone, within two paired standard errors."""
    about = f"query-agnostic, keep {keep:g}: one checkpoint beside one trained for this budget alone"
    limit = f"within {CLEAR:g} SE"
    if scores is None or not {(judged, keep), (single, keep)} <= scores.cells.keys():
        return Line(about, limit, "", "not measured")
    apart = scores.minus(judged, single, keep)
    met = apart.mean >= -CLEAR * _error(apart)
    return Line(about, limit, f"{_pm(apart, '+')} over {single}", _met(met))


def conditioning_counts(found: Evidence) -> Iterator[Line]:
    """What own features change, and what those of other prompts cost."""
    for name, of_keep in found.changed.items():
        shares = ", ".join(f"{100 * fmean(of_keep[keep]):.1f} % at {keep}" for keep in of_keep)
        yield Line(f"{name}: kept entries that mean features would not keep", "reported", shares, "reported")
        other, scores = f"{name}-shuffled", found.shuffled
        about, limit = f"{name}: score over the same with another prompt's features", f"above by {CLEAR:g} SE somewhere"
        if scores is None or other not in scores.policies:
            yield Line(about, limit, "", "not measured")
            continue
        apart = {keep: scores.minus(name, other, keep) for keep in scores.keeps}
        told = ", ".join(f"{_pm(one, '+')} at {keep:g}" for keep, one in apart.items())
        below = any(_above(Estimate(-one.mean, one.stderr, one.n)) for one in apart.values())
        yield Line(about, limit, told, _met(any(map(_above, apart.values())) and not below))


def families_held_out(found: Evidence) -> Iterator[Line]:
    """Every task by the policy that saw nothing of its family in training, beside the full cache and the rival."""
    agnostic = found.settings.get("query_agnostic")
    if agnostic is None or not found.held_out:
        return
    together = "held out"
    own = [
        {**record, "policy": together}
        for record in agnostic.records
        for family in found.held_out.get(record["policy"], ())
        if record["task"] == family or record["task"].startswith(f"{family}_")
    ]
    tasks = {record["task"] for record in own}
    scores = Scores([*own, *(one for one in agnostic.records if one["task"] in tasks)], 0.0, trained=agnostic.trained)
    for keep in agnostic.keeps:
        about = f"no episode of a task's family in training ({', '.join(found.held_out)}), keep {keep:g}: beside full"
        limit = f"≥ {RETAINED[keep]:g} %" if keep in RETAINED else "reported"
        if (together, keep) not in scores.cells or (RIVAL, keep) not in scores.cells:
            yield Line(about, limit, "", "not measured")
            continue
        own_part = scores.retained(together, keep)
        told = f"{_pm(own_part)} % of {len(tasks)} tasks; {_pm(scores.minus(together, RIVAL, keep), '+')} over {RIVAL}"
        verdict: Verdict = _met(own_part.mean >= RETAINED[keep]) if keep in RETAINED else "reported"
        yield Line(about, limit, told, verdict)


def generalises(found: Evidence) -> Iterator[Line]:
    """A policy that saw no retrieval beside the strongest rival; then everything that is elsewhere, as it is."""
    agnostic = found.settings.get("query_agnostic")
    if found.unseen is not None:
        for keep in agnostic.keeps if agnostic is not None else []:
            assert agnostic is not None
            about = f"{found.unseen} (text and reconstruction only), keep {keep:g}: at or above {RIVAL}"
            if not {(found.unseen, keep), (RIVAL, keep)} <= agnostic.cells.keys():
                yield Line(about, "≥ 0", "", "not measured")
                continue
            apart = agnostic.minus(found.unseen, RIVAL, keep)
            yield Line(about, "≥ 0", _pm(apart, "+"), _met(apart.mean >= 0))
    for name, scores in found.elsewhere.items():
        if not scores.tasks:
            told = "no task that the full cache answers"
        elif found.judged not in scores.policies:
            told = ""
        else:
            own = (f"{_pm(scores.of(found.judged, keep))} at {keep:g}" for keep in scores.keeps)
            full = fmean(record["score"] for record in scores.full.values())
            told = f"{', '.join(own)}; full cache {full:.1f}"
            if RIVAL in scores.policies:
                over = (f"{_pm(scores.minus(found.judged, RIVAL, keep), '+')} at {keep:g}" for keep in scores.keeps)
                told += f"; over {RIVAL} {', '.join(over)}"
        yield Line(f"elsewhere: {name}", "reported", told, "reported" if told else "not measured")


def logs_and_draws(found: Evidence) -> Line:
    """Whether the training of the policy left what a person needs to judge it."""
    about = "soft/hard gap, changed set against what it starts from, marginal value per head: logged and drawn"
    run = found.runs.get(found.judged)
    last = {} if run is None else last_validation(run)
    if run is None or not last:
        return Line(about, "there", "", "not measured")
    logged = {name: {key: value for key, value in last.items() if key.startswith(f"val/{name}@")} for name in LOGGED}
    drawn = [name for name in DRAWN if (run / name).is_file()]
    told = "; ".join(
        f"{name} " + ", ".join(f"{value:.3g} at {key.split('@')[1]}" for key, value in of_keep.items())
        for name, of_keep in logged.items()
    )
    return Line(about, "there", f"{told}; {', '.join(drawn)}", _met(all(logged.values()) and len(drawn) == len(DRAWN)))


def _beside_trained(judged: str, scores: Scores, keep: float) -> str:
    """The difference to the nearest method that was trained, which is not part of a bar."""
    if not scores.rivals(keep, trained=True):
        return ""
    rival, apart = scores.nearest(judged, keep, trained=True)
    return f"; {_pm(apart, '+')} over {rival} (trained)"


def _above(apart: Estimate) -> bool:
    return apart.mean > CLEAR * _error(apart)


def _in_errors(apart: Estimate) -> float:
    return apart.mean / max(_error(apart), 1e-9)


def _error(apart: Estimate) -> float:
    """Standard error, unknown for one sample: then nothing is clear."""
    return apart.stderr if apart.stderr == apart.stderr else float("inf")


def _met(yes: bool) -> Verdict:
    return "met" if yes else "missed"


def _pm(one: Estimate, sign: str = "") -> str:
    return f"{one.mean:{sign}.1f} ± {one.stderr:.1f}"
