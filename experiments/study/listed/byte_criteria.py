"""What must hold on a real model under budgets of bytes."""

from collections import Counter
from collections.abc import Iterator, Sequence

from experiments.study.config import name_of
from experiments.study.criteria import Line
from experiments.study.listed.criteria import CLEAR, GENERATED, MAIN, PARTS, TEXT, Measured, error_of, pm, verdict
from experiments.study.scores import Scores

RETAINED = {0.05: 97.0, 0.025: 90.0}
"""Percent of the full cache's score."""
ABOVE_ALL = 0.0125
METHOD_RATIO = {0.05: 0.6, 0.025: 0.6, 0.0125: 0.6}
UNIFORM_RATIO = {0.025: 0.8, 0.0125: 0.8}
LEAST_PROMPTS = 50
"""Per task, for scores that are generated."""
METHOD, UNIFORM = "the best method without training at its best uniform precision", "the learned scores at their best"


def lines(measured: Measured) -> Iterator[Line]:
    """All lines, in the order in which the criteria were set."""
    for part, percent in RETAINED.items():
        yield retains(measured, part, percent)
    yield above_everything(measured)
    yield from loses_less(measured, MAIN, METHOD_RATIO, "needles and chains", METHOD)
    yield from loses_less(measured, MAIN, UNIFORM_RATIO, "needles and chains", UNIFORM)
    yield from loses_less(measured, TEXT, METHOD_RATIO, "held-out books", METHOD)
    yield reads_once(measured)
    yield from parts_earn_their_place(measured)


def retains(measured: Measured, part: float, percent: float) -> Line:
    """Percent of the full cache's generated score, mean over tasks of paired ratios."""
    about, bar = f"generated, bytes {part:g}: score beside the full cache", f"≥ {percent:g} %"
    scores = measured.exact(GENERATED)
    if scores is None or (measured.policy, part) not in scores.cells:
        return Line(about, bar, "", "not measured")
    own = scores.paired_ratio(measured.policy, part)
    text = f"{pm(own, '', 1)} % of {len(scores.tasks)} tasks"
    if short := _too_few(scores, [measured.policy], part):
        return Line(about, bar, text + short, "not measured")
    return Line(about, bar, text, verdict(own.mean >= percent))


def above_everything(measured: Measured) -> Line:
    """Above every other policy, learned scores at uniform precisions too, by clearly more than chance."""
    about = f"generated, bytes {ABOVE_ALL:g}: above everything else"
    bar, scores = f"by more than {CLEAR:g} SE", measured.exact(GENERATED)
    others = [] if scores is None else _others(measured, scores, ABOVE_ALL)
    if scores is None or (measured.policy, ABOVE_ALL) not in scores.cells or not others:
        return Line(about, bar, "", "not measured")
    ahead = {other: scores.minus(measured.policy, other, ABOVE_ALL) for other in others}
    nearest = min(ahead, key=lambda other: ahead[other].mean - CLEAR * error_of(ahead[other]))
    text = f"{pm(ahead[nearest], '+', 1)} over {nearest}, of {len(others)} others"
    if short := _too_few(scores, [measured.policy, *others], ABOVE_ALL):
        return Line(about, bar, text + short, "not measured")
    return Line(about, bar, text, verdict(ahead[nearest].mean > CLEAR * error_of(ahead[nearest])))


def loses_less(measured: Measured, name: str, limits: dict[float, float], where: str, than: str) -> Iterator[Line]:
    """KL below a part of another's, by clearly more than chance over the same prompts."""
    scores = measured.kl(name)
    for part, limit in limits.items():
        about, bar = f"{where}, bytes {part:g}: KL over that of {than}", f"≤ {limit:g} by more than {CLEAR:g} SE"
        others = [] if scores is None else _ranked(measured, scores, part, than)
        if scores is None or (measured.policy, part) not in scores.cells or not others:
            yield Line(about, bar, "", "not measured")
            continue
        best = others[0]
        apart = scores.contrast(measured.policy, best, part, limit)
        text = f"{scores.ratio(measured.policy, best, part):.2f} of {best} ({pm(scores.of(best, part))}); "
        text += f"{pm(apart, '+')} against {limit:g} of it, n = {apart.n}"
        yield Line(about, bar, text, verdict(apart.mean < -CLEAR * error_of(apart)))


def reads_once(measured: Measured) -> Line:
    """How often the policy reads a prompt before it evicts."""
    about, scores = "needles and chains: readings of the prompt", measured.kl(MAIN)
    cells = [] if scores is None else [part for name, part in scores.cells if name == measured.policy]
    if scores is None or not cells:
        return Line(about, "1", "", "not measured")
    times = max(scores.mean_of(measured.policy, part, "prefills") for part in cells)
    return Line(about, "1", f"{times:.2f}", verdict(times == 1))


def parts_earn_their_place(measured: Measured) -> Iterator[Line]:
    """The policy against each variant without a part: clearly less KL somewhere, clearly more nowhere."""
    scores = measured.kl(PARTS)
    for name in map(name_of, measured.config.ablations):
        about, bar = f"KL of {measured.policy} against {name}", f"less by {CLEAR:g} SE somewhere, more nowhere"
        cells = [] if scores is None else [part for part in scores.keeps if (name, part) in scores.cells]
        cells = [part for part in cells if scores is not None and (measured.policy, part) in scores.cells]
        if scores is None or not cells:
            yield Line(about, bar, "", "not measured")
            continue
        apart = {part: scores.minus(measured.policy, name, part) for part in cells}
        less = any(one.mean < -CLEAR * error_of(one) for one in apart.values())
        more = any(one.mean > CLEAR * error_of(one) for one in apart.values())
        text = ", ".join(f"{pm(one, '+')} at {part:g}" for part, one in apart.items())
        yield Line(about, bar, text, verdict(less and not more))


def _ranked(measured: Measured, scores: Scores, part: float, than: str) -> list[str]:
    """Whom the KL is compared with, the least first."""
    if than == METHOD:
        return scores.rivals(part)
    uniform = [name for name in measured.uniform(scores) if (name, part) in scores.cells]
    return sorted(uniform, key=lambda name: scores.of(name, part).mean)


def _others(measured: Measured, scores: Scores, part: float) -> list[str]:
    """All policies at this budget that are no variants of the one under study."""
    own = {measured.policy, *map(name_of, measured.config.ablations)}
    return [name for name in scores.policies if name not in own and (name, part) in scores.cells]


def _too_few(scores: Scores, policies: Sequence[str], part: float) -> str:
    """What is missing where a task has fewer prompts than the criterion is about."""
    least = min(min(Counter(one["task"] for one in scores.cells[name, part]).values()) for name in policies)
    return f" (n = {least} per task, expected {LEAST_PROMPTS})" if least < LEAST_PROMPTS else ""
