"""Wording of the RULER tasks: contexts, needles, questions and answer prefixes."""

from dataclasses import dataclass

ONE = {"words": "word", "numbers": "number", "uuids": "code"}
MANY = {"words": "words", "numbers": "numbers", "uuids": "codes"}


@dataclass(frozen=True)
class NeedleWording:
    """Wording for needles whose values are of `kind` ("words", "numbers", "uuids"); `many`: several answers."""

    kind: str
    many: bool = False

    @property
    def _noun(self) -> str:
        return (MANY if self.many else ONE)[self.kind]

    @property
    def _verb(self) -> str:
        return "are" if self.many else "is"

    @property
    def intro(self) -> str:
        what = f"Secret {self._noun} are" if self.many else f"A secret {self._noun} is"
        return f"{what} noted somewhere in the pages below. Remember what you read, because a question follows.\n"

    def needle(self, key: str, value: str) -> str:
        return f"The secret {ONE[self.kind]} of {key} is {value}."

    def question(self, keys: list[str]) -> str:
        opening = "What are all" if self.many else "What is"
        return f"\n{opening} the secret {self._noun} of {listed(keys)} noted in the pages above?"

    def answer_prefix(self, keys: list[str]) -> str:
        return f" The secret {self._noun} of {listed(keys)} {self._verb}"


@dataclass(frozen=True)
class MemoWording(NeedleWording):
    """Needles in another wording, which is not in any training data: measures the template's part of a score."""

    @property
    def intro(self) -> str:
        return "Among these lines somebody has scattered short memos. You will be asked about them.\n"

    def needle(self, key: str, value: str) -> str:
        return f"Memo: whoever asks about {key} should be told {value}."

    def question(self, keys: list[str]) -> str:
        return f"\nSomebody asks about {listed(keys)}. What do the memos say?"

    def answer_prefix(self, keys: list[str]) -> str:
        return f" Whoever asks about {listed(keys)} should be told"


def listed(items: list[str]) -> str:
    """The items with commas and "and": "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


CHAIN_INTRO = "Follow in the pages below how a value is copied from variable to variable.\n"


def chain_statements(value: str, names: list[str]) -> list[str]:
    """One sentence per variable: the value goes into the first name, every name into the next one."""
    return [f"Copy {a} to {b}." for a, b in zip([value, *names], names, strict=False)]


def chain_question(value: str) -> str:
    """Question about all variables that `value` was copied to, directly or through others."""
    return f"\nWhich variables hold {value} in the end?"


def chain_prefix(value: str, count: int) -> str:
    """How the answer begins; `count` names follow it, in the order of the chain."""
    return f" These are the {count} variables, in order: copy {value} to"


def chain_example(names: list[str], value: str = "12345") -> str:
    """A solved chain, the example before the task."""
    statements = " ".join(chain_statements(value, names))
    question = chain_question(value) + chain_prefix(value, len(names))
    return f"An example: {statements}{question} {' '.join(names)}.\nNow the pages.\n"


COMMON_INTRO = "Here is a numbered list of words. A few of them come back more often than the others.\n"
COMMON_QUESTION = "\nWhich 10 words come back most often in the list?"
COMMON_PREFIX = " The 10 words that come back most often are:"


def numbered(words: list[str]) -> str:
    """A numbered list of words."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


CODED_INTRO = "Here is a text in code words. Count how often each of them occurs; dots only fill the space.\n"
CODED_QUESTION = "\nWhich 3 code words occur most often in the text, dots aside?"
CODED_PREFIX = " The 3 code words that occur most often are:"

DOCUMENTS_INTRO = "Read these documents and answer the question about them in as few words as you can.\n"
DOCUMENTS_PREFIX = " In short, the answer is:"


def document(number: int, text: str) -> str:
    """One of the documents of a context, under its number."""
    return f"\nDocument {number}:\n{text}\n"


def documents_question(question: str) -> str:
    """Text after the documents: how to answer, and the question."""
    return f"\nAnswer from the documents above, in as few words as you can. Question: {question}"
