"""Criteria for a trained policy: what must hold, what was measured, whether it is met."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from experiments.study.results import Results, last_validation
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
    criterion: str
    measured: str
    verdict: Verdict


def lines(results: Results) -> Iterator[Line]:
    """All lines, in the order in which the criteria were set."""
    agnostic, aware = (results.settings.get(f"query_{one}") for one in ("agnostic", "aware"))
    if agnostic is not None or results.text is None:  # there are tasks
        yield from (retains(results.policy, agnostic, keep, percent) for keep, percent in RETAINED.items())
    if agnostic is not None:
        yield from (beats_all(results.policy, agnostic, keep) for keep in agnostic.keeps)
    if aware is not None:
        yield from (is_among_the_best(results.policy, aware, keep) for keep in aware.keeps)
    for keep, limit in TEXT_RATIO.items():
        yield loses_less_text(results.policy, results.text, keep, limit)
    for name, keep in results.single.items():
        yield serves_all_budgets(results.policy, name, agnostic, keep)
    yield from conditioning_counts(results)
    yield from families_held_out(results)
    yield from generalises(results)
    yield logs_and_draws(results)


def retains(policy: str, scores: Scores | None, keep: float, percent: float) -> Line:
    """Percent of the full cache's score."""
    about, limit = f"query-agnostic, keep {keep:g}: score beside the full cache", f"≥ {percent:g} %"
    if scores is None or (policy, keep) not in scores.cells:
        return Line(about, limit, "", "not measured")
    own = scores.retained(policy, keep)
    return Line(about, limit, f"{_pm(own)} %", _met(own.mean >= percent))


def beats_all(policy: str, scores: Scores, keep: float) -> Line:
    """Above every method without training by more than two paired standard errors, or nearly full."""
    about = f"query-agnostic, keep {keep:g}: above every method without training"
    limit = f"by more than {CLEAR:g} SE, or ≥ {NEARLY_FULL:g} % of full"
    rivals = scores.rivals(keep)
    if (policy, keep) not in scores.cells or not rivals:
        return Line(about, limit, "", "not measured")
    difference = {rival: scores.minus(policy, rival, keep) for rival in rivals}
    short = [rival for rival, one in difference.items() if not _above(one)]
    worst = min(difference, key=lambda rival: _in_errors(difference[rival]))
    own = scores.retained(policy, keep)
    measured = f"{_pm(difference[worst], '+')} over {worst}; {own.mean:.1f} % of full"
    if short:
        measured += f"; not clearly above {', '.join(short[:4])}{' and others' if len(short) > 4 else ''}"
    measured += _beside_trained(policy, scores, keep)
    return Line(about, limit, measured, _met(not short or own.mean >= NEARLY_FULL))


def is_among_the_best(policy: str, scores: Scores, keep: float) -> Line:
    """At or above the best method, trained or not, within one paired standard error."""
    about = f"query-aware, keep {keep:g}: at or above the best method"
    if (policy, keep) not in scores.cells or not scores.rivals(keep):
        return Line(about, "within 1 SE", "", "not measured")
    rival, difference = scores.nearest(policy, keep)
    measured = f"{_pm(difference, '+')} over {rival}{_beside_trained(policy, scores, keep)}"
    every = [scores.minus(policy, other, keep) for other in scores.others(keep)]
    return Line(about, "within 1 SE", measured, _met(all(one.mean >= -_error(one) for one in every)))


def loses_less_text(policy: str, text: Scores | None, keep: float, most: float) -> Line:
    """KL over that of the best method without training."""
    about, limit = f"held-out text, keep {keep:g}: KL over the best method's without training", f"≤ {most:g}"
    if text is None or (policy, keep) not in text.cells or not text.rivals(keep):
        return Line(about, limit, "", "not measured")
    best = text.rivals(keep)[0]
    ratio = text.ratio(policy, best, keep)
    own = text.of(policy, keep).mean
    measured = f"{ratio:.2f} ({own:.4f} nats per token) of {best}"
    if trained := text.rivals(keep, trained=True):
        measured += f"; {text.ratio(policy, trained[0], keep):.2f} of {trained[0]} (trained)"
    return Line(about, limit, measured, _met(ratio <= most))


def serves_all_budgets(policy: str, single: str, scores: Scores | None, keep: float) -> Line:
    """Not worse than a policy trained for this budget alone, within two paired standard errors."""
    about = f"query-agnostic, keep {keep:g}: one checkpoint beside one trained for this budget alone"
    limit = f"within {CLEAR:g} SE"
    if scores is None or not {(policy, keep), (single, keep)} <= scores.cells.keys():
        return Line(about, limit, "", "not measured")
    difference = scores.minus(policy, single, keep)
    met = difference.mean >= -CLEAR * _error(difference)
    return Line(about, limit, f"{_pm(difference, '+')} over {single}", _met(met))


def conditioning_counts(results: Results) -> Iterator[Line]:
    """What own features change, and what those of other prompts cost."""
    for name, of_keep in results.changed.items():
        shares = ", ".join(f"{100 * fmean(of_keep[keep]):.1f} % at {keep}" for keep in of_keep)
        yield Line(f"{name}: kept entries that mean features would not keep", "reported", shares, "reported")
        other, scores = f"{name}-shuffled", results.shuffled
        about, limit = f"{name}: score over the same with another prompt's features", f"above by {CLEAR:g} SE somewhere"
        if scores is None or other not in scores.policies:
            yield Line(about, limit, "", "not measured")
            continue
        difference = {keep: scores.minus(name, other, keep) for keep in scores.keeps}
        measured = ", ".join(f"{_pm(one, '+')} at {keep:g}" for keep, one in difference.items())
        below = any(_above(Estimate(-one.mean, one.stderr, one.n)) for one in difference.values())
        yield Line(about, limit, measured, _met(any(map(_above, difference.values())) and not below))


def families_held_out(results: Results) -> Iterator[Line]:
    """Every task by the policy that saw nothing of its family in training, beside the full cache and the rival."""
    agnostic = results.settings.get("query_agnostic")
    if agnostic is None or not results.held_out:
        return
    together = "held out"
    own = [
        {**record, "policy": together}
        for record in agnostic.records
        for family in results.held_out.get(record["policy"], ())
        if record["task"] == family or record["task"].startswith(f"{family}_")
    ]
    tasks = {record["task"] for record in own}
    scores = Scores([*own, *(one for one in agnostic.records if one["task"] in tasks)], 0.0, trained=agnostic.trained)
    for keep in agnostic.keeps:
        about = f"no episode of a task's family in training ({', '.join(results.held_out)}), keep {keep:g}: beside full"
        limit = f"≥ {RETAINED[keep]:g} %" if keep in RETAINED else "reported"
        if (together, keep) not in scores.cells or (RIVAL, keep) not in scores.cells:
            yield Line(about, limit, "", "not measured")
            continue
        own_part = scores.retained(together, keep)
        measured = (
            f"{_pm(own_part)} % of {len(tasks)} tasks; {_pm(scores.minus(together, RIVAL, keep), '+')} over {RIVAL}"
        )
        verdict: Verdict = _met(own_part.mean >= RETAINED[keep]) if keep in RETAINED else "reported"
        yield Line(about, limit, measured, verdict)


def generalises(results: Results) -> Iterator[Line]:
    """A policy that saw no retrieval beside the strongest rival; then the out-of-domain comparisons, as they are."""
    agnostic = results.settings.get("query_agnostic")
    if results.unseen is not None:
        for keep in agnostic.keeps if agnostic is not None else []:
            assert agnostic is not None
            about = f"{results.unseen} (text and reconstruction only), keep {keep:g}: at or above {RIVAL}"
            if not {(results.unseen, keep), (RIVAL, keep)} <= agnostic.cells.keys():
                yield Line(about, "≥ 0", "", "not measured")
                continue
            difference = agnostic.minus(results.unseen, RIVAL, keep)
            yield Line(about, "≥ 0", _pm(difference, "+"), _met(difference.mean >= 0))
    for name, scores in results.out_of_domain.items():
        if not scores.tasks:
            measured = "no task that the full cache answers"
        elif results.policy not in scores.policies:
            measured = ""
        else:
            own = (f"{_pm(scores.of(results.policy, keep))} at {keep:g}" for keep in scores.keeps)
            full = fmean(record["score"] for record in scores.full.values())
            measured = f"{', '.join(own)}; full cache {full:.1f}"
            if RIVAL in scores.policies:
                over = (f"{_pm(scores.minus(results.policy, RIVAL, keep), '+')} at {keep:g}" for keep in scores.keeps)
                measured += f"; over {RIVAL} {', '.join(over)}"
        yield Line(f"out of domain: {name}", "reported", measured, "reported" if measured else "not measured")


def logs_and_draws(results: Results) -> Line:
    """Whether the training of the policy left what a person needs to assess it."""
    about = "soft/hard gap, changed set against what it starts from, marginal value per head: logged and drawn"
    run = results.runs.get(results.policy)
    last = {} if run is None else last_validation(run)
    if run is None or not last:
        return Line(about, "there", "", "not measured")
    logged = {name: {key: value for key, value in last.items() if key.startswith(f"val/{name}@")} for name in LOGGED}
    drawn = [name for name in DRAWN if (run / name).is_file()]
    measured = "; ".join(
        f"{name} " + ", ".join(f"{value:.3g} at {key.split('@')[1]}" for key, value in of_keep.items())
        for name, of_keep in logged.items()
    )
    return Line(
        about, "there", f"{measured}; {', '.join(drawn)}", _met(all(logged.values()) and len(drawn) == len(DRAWN))
    )


def _beside_trained(policy: str, scores: Scores, keep: float) -> str:
    """The difference to the nearest method that was trained, which is not part of the criterion."""
    if not scores.rivals(keep, trained=True):
        return ""
    rival, difference = scores.nearest(policy, keep, trained=True)
    return f"; {_pm(difference, '+')} over {rival} (trained)"


def _above(difference: Estimate) -> bool:
    return difference.mean > CLEAR * _error(difference)


def _in_errors(difference: Estimate) -> float:
    return difference.mean / max(_error(difference), 1e-9)


def _error(difference: Estimate) -> float:
    """Standard error, unknown for one sample: then nothing is clear."""
    return difference.stderr if difference.stderr == difference.stderr else float("inf")


def _met(yes: bool) -> Verdict:
    return "met" if yes else "missed"


def _pm(one: Estimate, sign: str = "") -> str:
    return f"{one.mean:{sign}.1f} ± {one.stderr:.1f}"
