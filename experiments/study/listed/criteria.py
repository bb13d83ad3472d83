"""What must hold on a real model: criteria of a study that lists its comparisons."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan

from experiments.study.config import StudyConfig, name_of
from experiments.study.criteria import Line, Verdict
from experiments.study.listed.kl import exact_scores, kl_scores
from experiments.study.scores import Scores
from learnkv.evaluation.results import Estimate, Record

CLEAR = 2.0
"""Standard errors that are not chance; "at or above" is: not worse by as many."""
NEEDLES_RATIO = {0.25: 0.75, 0.1: 0.75, 0.05: 0.35, 0.025: 0.35}
TEXT_RATIO = {0.25: 0.6, 0.1: 0.6, 0.05: 0.6}
SECOND_READING = "kvzip"
"""The rival of a policy that saw no retrieval."""
LARGEST_KEEP = {"unseen": 0.25, "longer": 0.1}
MAIN, GENERATED, TEXT, AWARE, PARTS = "needles", "generated", "text", "query-aware", "parts"
LONGER = ("length-2048", "length-4096")
"""Names of the comparisons that criteria are about."""


@dataclass(frozen=True)
class Measured:
    """The samples of every comparison that has some.

    Args:
        config: the study.
        records: by the name of the comparison.
    """

    config: StudyConfig
    records: Mapping[str, Sequence[Record]]

    @property
    def policy(self) -> str:
        """The policy under study."""
        return name_of(self.config.learned)

    def uniform(self, scores: Scores) -> list[str]:
        """The learned scores at uniform precisions, in these samples."""
        if self.config.uniform is None:
            return []
        return [name for name in scores.policies if name.startswith(f"{name_of(self.config.uniform)}@")]

    def kl(self, name: str) -> Scores | None:
        """KL of a comparison, None where it was not measured."""
        return kl_scores(self.records[name], self.config) if self.records.get(name) else None

    def exact(self, name: str) -> Scores | None:
        """Exact answers of a comparison by forced scores, or scores of generated ones."""
        return exact_scores(self.records[name], self.config) if self.records.get(name) else None


def lines(measured: Measured) -> Iterator[Line]:
    """All lines, in the order in which the criteria were set."""
    yield from ratios(measured, MAIN, NEEDLES_RATIO, "query-agnostic needles and chains")
    yield from beats_when_generating(measured)
    yield from ratios(measured, TEXT, TEXT_RATIO, "held-out books")
    yield from among_the_best(measured)
    yield from saw_no_retrieval(measured)
    for name in LONGER:
        yield from above_every_method(measured, name)
    yield from parts_help(measured)


def ratios(measured: Measured, name: str, limits: Mapping[float, float], about: str) -> Iterator[Line]:
    """KL of the policy over that of the best method without training."""
    scores = measured.kl(name)
    for keep, limit in limits.items():
        head, bar = f"{about}, keep {keep:g}: KL over that of the best method without training", f"≤ {limit:g}"
        if scores is None or (measured.policy, keep) not in scores.cells or not scores.rivals(keep):
            yield Line(head, bar, "", "not measured")
            continue
        rival = scores.rivals(keep)[0]
        ratio, own = scores.ratio(measured.policy, rival, keep), scores.of(measured.policy, keep)
        difference = scores.minus(measured.policy, rival, keep)
        text = f"{ratio:.2f} of {rival} ({pm(own)}, {pm(difference, '+')} against it, n = {difference.n})"
        yield Line(head, bar, text, verdict(ratio <= limit))


def beats_when_generating(measured: Measured) -> Iterator[Line]:
    """Above the best of the others where that one is clearly below the full cache, else not clearly worse."""
    scores = measured.exact(GENERATED)
    for keep in scores.keeps if scores is not None else (0.25, 0.1, 0.05, 0.025):
        about = f"generated, query-agnostic, keep {keep:g}: above the best method without training"
        bar = f"by more than {CLEAR:g} SE where that is as far below the full cache, else not worse by as many"
        if scores is None or (measured.policy, keep) not in scores.cells or not scores.rivals(keep):
            yield Line(about, bar, "", "not measured")
            continue
        rival = scores.rivals(keep)[0]
        short, ahead = scores.below_full(rival, keep), scores.minus(measured.policy, rival, keep)
        clearly_short = short.mean > CLEAR * error_of(short)
        met = ahead.mean > CLEAR * error_of(ahead) if clearly_short else ahead.mean >= -CLEAR * error_of(ahead)
        text = f"{pm(ahead, '+', 1)} over {rival}, which is {pm(short, '', 1)} below full (n = {ahead.n})"
        yield Line(about, bar, text, verdict(met))


def among_the_best(measured: Measured) -> Iterator[Line]:
    """Query-aware: not clearly worse than any method, in KL and in exact answers."""
    kl, exact = measured.kl(AWARE), measured.exact(AWARE)
    for keep in kl.keeps if kl is not None else (0.25, 0.1, 0.05):
        about, bar = f"query-aware, keep {keep:g}: at or above every method", f"not worse by {CLEAR:g} SE"
        scored = [one for one in (kl, exact) if one is not None and one.tasks]
        if any((measured.policy, keep) not in one.cells or not one.rivals(keep) for one in scored) or not scored:
            yield Line(about, bar, "", "not measured")
            continue
        nearest = ((one, one.rivals(keep)[0]) for one in scored)
        text = "; ".join(f"{_difference(one, measured.policy, rival, keep)} against {rival}" for one, rival in nearest)
        met = all(not_worse(one, measured.policy, other, keep) for one in scored for other in one.rivals(keep))
        yield Line(about, bar, text, verdict(met))


def saw_no_retrieval(measured: Measured) -> Iterator[Line]:
    """A policy without retrieval in training beside the method that reads the prompt twice."""
    if measured.config.unseen is None:
        return
    own = name_of(measured.config.unseen)
    of_needles, of_text = (measured.kl(MAIN), measured.exact(MAIN)), (measured.kl(TEXT),)
    for where, tables in (("needles and chains", of_needles), ("held-out books", of_text)):
        scored = [scores for scores in tables if scores is not None and scores.tasks]
        for keep in (
            [keep for keep in scored[0].keeps if keep <= LARGEST_KEEP["unseen"]] if scored else (0.25, 0.1, 0.05)
        ):
            about, bar = f"{own}, {where}, keep {keep:g}: at or above {SECOND_READING}", f"not worse by {CLEAR:g} SE"
            if not scored or any(not {(own, keep), (SECOND_READING, keep)} <= one.cells.keys() for one in scored):
                yield Line(about, bar, "", "not measured")
                continue
            text = "; ".join(_difference(one, own, SECOND_READING, keep) for one in scored)
            met = all(not_worse(one, own, SECOND_READING, keep) for one in scored)
            yield Line(about, bar, text, verdict(met))


def above_every_method(measured: Measured, name: str) -> Iterator[Line]:
    """Longer prompts than those of the training: less KL than every method without training."""
    scores = measured.kl(name)
    keeps = [keep for keep in scores.keeps if keep <= LARGEST_KEEP["longer"]] if scores is not None else [0.1, 0.05]
    for keep in keeps:
        about, bar = f"{name}, keep {keep:g}: less KL than every method without training", "< 0"
        if scores is None or (measured.policy, keep) not in scores.cells or not scores.rivals(keep):
            yield Line(about, bar, "", "not measured")
            continue
        rival, nearest = scores.nearest(measured.policy, keep)
        text = f"{pm(nearest, '+')} against {rival} (n = {nearest.n})"
        yield Line(about, bar, text, verdict(nearest.mean < 0))


def parts_help(measured: Measured) -> Iterator[Line]:
    """What each part of the policy is worth: the whole against the variant without it."""
    scores = measured.kl(PARTS)
    for name in map(name_of, measured.config.ablations):
        about = f"{name}: KL against {measured.policy}"
        if scores is None or not any((name, keep) in scores.cells for keep in scores.keeps):
            yield Line(about, "reported", "", "not measured")
            continue
        cells = [keep for keep in scores.keeps if {(name, keep), (measured.policy, keep)} <= scores.cells.keys()]
        text = ", ".join(f"{pm(scores.minus(name, measured.policy, keep), '+')} at {keep:g}" for keep in cells)
        yield Line(about, "reported", text, "reported")


def not_worse(scores: Scores, policy: str, other: str, keep: float) -> bool:
    """Whether `policy` is not clearly behind: less KL, or a higher score, is better."""
    difference = scores.minus(policy, other, keep)
    behind = difference.mean if scores.value == "kl" else -difference.mean
    return behind <= CLEAR * error_of(difference)


def _difference(scores: Scores, policy: str, other: str, keep: float) -> str:
    """KL or exact answers of a policy minus another's."""
    difference = scores.minus(policy, other, keep)
    return f"KL {pm(difference, '+')}" if scores.value == "kl" else f"exact {pm(difference, '+', 1)}"


def error_of(difference: Estimate) -> float:
    """Standard error, unknown for one sample: then nothing is clear."""
    return inf if isnan(difference.stderr) else difference.stderr


def verdict(yes: bool) -> Verdict:
    """Of a criterion that was measured."""
    return "met" if yes else "missed"


def pm(one: Estimate, sign: str = "", digits: int = 4) -> str:
    """A mean with its standard error."""
    return f"{one.mean:{sign}.{digits}f} ± {one.stderr:.{digits}f}"
