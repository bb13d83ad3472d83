"""One evaluation prompt in parts, and the score of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from learnkv.data.documents import check_text
from learnkv.errors import UserError

Metric = Literal["all", "part"]


@dataclass(frozen=True)
class Draft:
    """The text of a prompt; fields as in `Sample`."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]
    wording: str = field(default="", kw_only=True)
    depth: float | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Sample(Draft):
    """A prompt of `task`: `context`, then `question`, then `answer_prefix`, then up to `max_new_tokens` of the model's.

    The question contains no part of the answer prefix, and the context no part of the question. `answers` are the
    expected strings: all of them, or any one of them where `metric` is "part". `wording` is a complete correct answer
    in the form that the prompt asks for, where that is not the answers with commas between them. `depth` is where in
    the haystack the first answer is, in percent; None where there is no haystack. `system` is the system message before
    the context, and without `chat` a chat template is not used.
    """

    task: str
    max_new_tokens: int
    metric: Metric = "all"
    system: str = field(default="", kw_only=True)
    chat: bool = field(default=True, kw_only=True)

    loops_decide: ClassVar[bool] = True
    """Whether the score is known once the output repeats itself."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Installed packages that the score depends on."""

    @property
    def gold(self) -> str:
        """A complete correct answer, as it follows the answer prefix."""
        answers = self.answers[:1] if self.metric == "part" else self.answers
        return self.wording or ", ".join(answers)

    @property
    def scoring(self) -> tuple[Any, ...]:
        """What the score of an output depends on."""
        return self.answers, self.max_new_tokens, self.metric

    def score(self, prediction: str) -> float:
        """Share of the answers that occur in `prediction`, ignoring case, 0 to 1; with "part" 1 for any of them."""
        text = _comparable(prediction)
        correct = [_comparable(answer) in text for answer in self.answers]
        return float(any(correct)) if self.metric == "part" else sum(correct) / len(correct)

    def complete(self, prediction: str) -> bool:
        """Whether the score of `prediction` is that of every continuation of it."""
        return self.score(prediction) == 1


def check_answers(answers: Sequence[Any], where: str) -> None:
    """Raise UserError for answers that nothing can be scored by: none, no text, or what every output contains.

    Args:
        where: file and place, for errors.
    """
    if not answers:
        raise UserError(f"{where}: expected an answer, got an empty list")
    for answer in answers:
        check_text(answer, where, "an answer of text")
        if not _comparable(answer).strip():
            raise UserError(f"{where}: expected an answer, got a blank one, which every output would contain")


def _comparable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).lower()
