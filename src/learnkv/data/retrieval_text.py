"""Wording of the training episodes; no sentence here is one of the evaluation's (`ruler_text`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A sentence with a `{key}` and its `{value}`, and two questions about the value.

    `question` is about one value, `question_all` about all values of a key that has several. Both end in the words
    before the value in the sentence, so that the answer continues them.
    """

    sentence: str
    question: str
    question_all: str


FACTS = (
    Fact(
        "The locker {key} opens with {value}.",
        "\nHow is it opened? The locker {key} opens with",
        "\nHow can it be opened, in every way? The locker {key} opens with",
    ),
    Fact(
        "Entry {key} reads {value}.",
        "\nLook it up. Entry {key} reads",
        "\nLook up each line. Entry {key} reads",
    ),
    Fact(
        "If they say {key}, answer {value}.",
        "\nIf they say {key}, answer",
        "\nGive each reply you know. If they say {key}, answer",
    ),
    Fact(
        "On the label of {key} stands {value}.",
        "\nRead the label. On the label of {key} stands",
        "\nRead every label. On the label of {key} stands",
    ),
    Fact(
        "Guests of {key} call {value}.",
        "\nWhom to call? Guests of {key} call",
        "\nName all calls. Guests of {key} call",
    ),
)

CHAIN_LINK = "Pass {source} along as {target}."
CHAIN_QUESTION = "\nUnder which names does it travel? Pass {source} along as"

SPAN_QUESTIONS = (
    "\nRepeat the passage that begins with: {start}",
    "\nGo on reading aloud from the words: {start}",
    "\nWhat was written after this? {start}",
)

FILLER = (
    "Leaves move a little.",
    "A door closes far away.",
    "Somebody hums an old tune.",
    "The bread is still fresh.",
    "It will be dark before long.",
)
