"""One of the comparisons that a study lists."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from learnkv.data.ruler_needles import Template
from learnkv.data.words import Language
from learnkv.errors import UserError
from learnkv.evaluation.config import Metric, Setting
from learnkv.evaluation.precisions import check_precisions

Whom = Literal["learned", "unseen", "ablations", "baselines", "best", "uniform"]


@dataclass(frozen=True)
class Comparison:
    """One of the comparisons of a study that lists them; keys are those of eval unless said otherwise.

    Args:
        policies: learned, unseen and ablations are the study's; baselines are all other methods, best the best of these
            without training; uniform are the scores of the study's `uniform` at every precision.
        best: how many these are.
        chosen_in: the comparison whose KL names the best; its seed is another, so that its prompts are others.
        score: generated or forced.
        keep: fractions of the prompt's entries to keep (default 0.25,0.1,0.05 where there are no bytes).
        bytes: in their place fractions of the bytes of the prompt's entries at 16 bits.
        precision: bits at which `uniform` and the baselines without training are measured, each at every one, and the
            whole cache beside them; the best are at the precision that they were chosen with.
        tasks: RULER's tasks, or text.
        lengths: prompt lengths in tokens.
        setting: query_agnostic or query_aware.
        samples: prompts per task and length.
        batch_size: prompts read at once.
        answers: prompts whose answers are written at once, policies side by side; default: one policy after the other.
        template: wording of needles and questions.
        keys: language of the needles' keys.
        haystack: text to hide needles in; `docstrings` for those of the standard library that nothing is trained on.
        seed: of the prompts.
    """

    policies: tuple[Whom, ...] = ("learned", "best")
    best: int = 5
    chosen_in: str = "choice"
    score: Metric = "forced"
    keep: tuple[float, ...] = ()
    bytes: tuple[float, ...] = ()
    precision: tuple[int | str, ...] = ()
    tasks: tuple[str, ...] = ("niah_single_1",)
    lengths: tuple[int, ...] = (1024,)
    setting: tuple[Setting, ...] = ("query_agnostic",)
    samples: int = 50
    batch_size: int = 4
    answers: int | None = None
    template: Template = "secret"
    keys: Language = "english"
    haystack: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.best < 1 or self.samples < 1 or self.batch_size < 1:
            raise UserError(
                f"best={self.best} samples={self.samples} batch_size={self.batch_size}: expected at least 1"
            )
        if self.keep and self.bytes:
            raise UserError(f"keep={_list(self.keep)} bytes={_list(self.bytes)}: expected one of them in a comparison")
        for part in self.bytes:
            if not 0 < part <= 1:
                raise UserError(f"bytes={part:g}: expected a fraction, above 0 and at most 1")
        check_precisions(self.precision)
        if self.precision and not {"baselines", "uniform"} & {*self.policies}:
            raise UserError(f"precision={_list(self.precision)}: expected baselines or uniform among the policies")
        if "uniform" in self.policies and not self.precision:
            raise UserError("policies=uniform: expected precision= with it, got none")

    @property
    def keeps(self) -> tuple[float, ...]:
        """Fractions of entries, also where they are the default."""
        return () if self.bytes else self.keep or (0.25, 0.1, 0.05)

    def check_choice(self, name: str, others: Mapping[str, "Comparison"]) -> None:
        """UserError where the best are to be named by a comparison that cannot."""
        chooses = others.get(self.chosen_in)
        if "best" in self.policies and (chooses is None or "baselines" not in chooses.policies):
            raise UserError(
                f"comparisons.{name}.chosen_in={self.chosen_in}: expected a comparison with the policies baselines"
            )
        if "best" in self.policies and chooses is not None and bool(chooses.bytes) != bool(self.bytes):
            raise UserError(f"comparisons.{name}.chosen_in={self.chosen_in}: expected budgets of the same kind")


def _list(values: Iterable[object]) -> str:
    return ",".join(map(str, values))
