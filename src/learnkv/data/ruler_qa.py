"""RULER's question answering: the paragraphs with the answer among other paragraphs of the same file."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from learnkv.data import ruler_text as text
from learnkv.data.documents import check_text, read_document
from learnkv.data.sample import Draft, check_answers
from learnkv.errors import UserError
from learnkv.formats.files import parse_json

Layout = Literal["squad", "hotpotqa"]


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the indices of the documents with the answer."""

    question: str
    answers: list[str]
    own: list[int]


@dataclass(frozen=True)
class Documents:
    """All documents of a file and the questions on them."""

    layout: Layout
    texts: list[str]
    questions: list[Question]


@lru_cache(maxsize=4)
def read_documents(path: str) -> Documents:
    """A .json or .json.gz file in SQuAD's or HotpotQA's layout. Raises UserError for any other."""
    try:
        data = parse_json(read_document(path, "qa"))
        read = _squad(data) if isinstance(data, dict) else _hotpotqa(data)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UserError(f"qa={path}: expected JSON in SQuAD's or HotpotQA's layout ({error!r})") from error
    _check(read, f"qa={path}")
    return read


def _check(data: Documents, where: str) -> None:
    """Raise UserError for paragraphs, questions and answers that are no text, and answers without their paragraph."""
    for number, paragraph in enumerate(data.texts, 1):
        check_text(paragraph, f"{where}: paragraph {number}")
    for number, question in enumerate(data.questions, 1):
        check_text(question.question, f"{where}: question {number}")
        check_answers(question.answers, f"{where}: question {number}")
        if not question.own:
            raise UserError(f"{where}: question {number}: none of its paragraphs has the title of a supporting fact")


def _squad(data: dict[str, Any]) -> Documents:
    place: dict[str, int] = {}
    questions = []
    for paragraph in (paragraph for article in data["data"] for paragraph in article["paragraphs"]):
        own = place.setdefault(paragraph["context"], len(place))
        for item in paragraph["qas"]:
            if not item.get("is_impossible", False):
                answers = list(dict.fromkeys(answer["text"] for answer in item["answers"]))
                questions.append(Question(item["question"], answers, [own]))
    return Documents("squad", list(place), questions)


def _hotpotqa(data: list[dict[str, Any]]) -> Documents:
    place: dict[str, int] = {}
    questions = []
    for item in data:
        paragraphs = [f"{title}\n{''.join(parts)}" for title, parts in item["context"]]
        own = [place.setdefault(paragraph, len(place)) for paragraph in paragraphs]
        supporting = {title for title, _ in item["supporting_facts"]} if "supporting_facts" in item else None
        if supporting:
            own = [i for i, (title, _) in zip(own, item["context"], strict=True) if title in supporting]
        questions.append(Question(item["question"], [item["answer"]], own))
    return Documents("hotpotqa", list(place), questions)


def documents(rng: random.Random, data: Documents, question: Question) -> tuple[Callable[[int], Draft], int]:
    """Drafts of a question with any number of other documents (the units), and how many there are."""
    others = [i for i in range(len(data.texts)) if i not in set(question.own)]
    rng.shuffle(others)
    order = rng.getrandbits(64)

    def draft(units: int) -> Draft:
        chosen = question.own + others[:units]
        random.Random(order).shuffle(chosen)
        context = text.DOCUMENTS_INTRO + "".join(text.document(n, data.texts[i]) for n, i in enumerate(chosen, 1))
        return Draft(context, text.documents_question(question.question), text.DOCUMENTS_PREFIX, question.answers)

    return draft, len(others)
