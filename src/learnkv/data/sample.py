"""One evaluation prompt, cut where compression may cut it, and how an answer to it is scored."""

from dataclasses import dataclass
from typing import Literal

Metric = Literal["all", "part"]


@dataclass(frozen=True)
class Draft:
    """The text of a prompt; the fields mean what they mean in `Sample`."""

    context: str
    question: str
    answer_prefix: str
    answers: list[str]


@dataclass(frozen=True)
class Sample(Draft):
    """A prompt of `task`: `context`, then `question`, then `answer_prefix`, then up to `max_new_tokens` of the model's.

    The question holds nothing of the answer prefix and the context nothing of the question. `answers` are the strings
    looked for: all of them, or any one of them where `metric` is "part".
    """

    task: str
    max_new_tokens: int
    metric: Metric = "all"

    def score(self, prediction: str) -> float:
        """Share of the answers that occur in `prediction`, whatever the case, 0 to 1; 1 for any with "part"."""
        said = "".join(c if c.isprintable() else " " for c in prediction).lower()
        found = [answer.lower() in said for answer in self.answers]
        return float(any(found)) if self.metric == "part" else sum(found) / len(found)
