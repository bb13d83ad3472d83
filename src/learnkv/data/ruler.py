"""RULER's 13 task types for any tokenizer and length, in wording of our own (Hsieh et al. 2024, arXiv 2404.06654)."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from learnkv.data.fitting import filled, prompt_tokens
from learnkv.data.ruler_lists import chain, coded_words, common_words
from learnkv.data.ruler_needles import Needles, Template
from learnkv.data.ruler_qa import Documents, Question, documents, read_documents
from learnkv.data.sample import Draft, Metric, Sample
from learnkv.data.words import Language, Split
from learnkv.errors import UserError

NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(),
    "niah_single_3": Needles(value_kind="uuids"),
    "niah_multikey_1": Needles(keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles(values=4),
    "niah_multiquery": Needles(queries=4),
}
QA_LAYOUT = {"qa_1": "squad", "qa_2": "hotpotqa"}
NEW_TOKENS: dict[str, int] = {
    **dict.fromkeys(NEEDLES, 128),
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    **dict.fromkeys(QA_LAYOUT, 32),
}
TASKS: tuple[str, ...] = tuple(NEW_TOKENS)


class Ruler:
    """Generator of RULER prompts: `sample(task, index)` is a function of its arguments and of the ones here.

    Args:
        tokenizer: any Hugging Face tokenizer; it only counts.
        length: tokens of the complete prompt with room for the answer, filled as closely as the task's units allow.
        seed: seed of all prompts.
        split: "eval", or "train" for other words, numbers, UUIDs and names than any evaluation has.
        haystack: .txt or .txt.gz file of essays; CPython's help topics if None.
        qa: files with the documents of qa_1 (SQuAD's layout) and qa_2 (HotpotQA's layout), .json or .json.gz.
        template: wording of needles and questions: `secret`, or `memo`, which is not in any training data.
        keys: language of the needles' keys, where they are words.
    """

    def __init__(
        self,
        tokenizer: Any,
        length: int,
        *,
        seed: int = 42,
        split: Split = "eval",
        haystack: str | None = None,
        qa: str | list[str] | None = None,
        template: Template = "secret",
        keys: Language = "english",
    ):
        self.tokenizer, self.length, self.seed, self.split, self.haystack = tokenizer, length, seed, split, haystack
        self.template, self.keys = template, keys
        self.qa = [qa] if isinstance(qa, str) else list(qa or [])
        self._fitting: dict[str, tuple[list[Question], Iterator[Question]]] = {}

    def sample(self, task: str, index: int) -> Sample:
        """Prompt number `index` of `task`.

        Raises UserError for an unknown task, a length in which the task does not fit, and QA without its file.
        """
        if task not in NEW_TOKENS:
            raise UserError(f"task {task!r}: expected one of {', '.join(TASKS)}")
        rng = random.Random(f"{self.seed}:{self.split}:{task}:{index}")
        draft, most = self._drafts(task, index, rng)
        chosen = filled(task, draft, self.tokenizer, self.length, NEW_TOKENS[task], most)
        metric: Metric = "part" if task in QA_LAYOUT else "all"
        return Sample(**vars(chosen), task=task, max_new_tokens=NEW_TOKENS[task], metric=metric)

    def _tokens(self, draft: Draft) -> int:
        return prompt_tokens(self.tokenizer, draft)

    def _drafts(self, task: str, index: int, rng: random.Random) -> tuple[Callable[[int], Draft], int | None]:
        if task in NEEDLES:
            needles = replace(NEEDLES[task], template=self.template)
            if needles.key_kind == "words" and self.keys != "english":
                needles = replace(needles, key_kind=self.keys)
            return needles(rng, self.split, self.haystack), None
        if task == "vt":
            return chain(rng, self.split), None
        if task == "cwe":
            return common_words(rng, self.split, self.length), None
        if task == "fwe":
            return coded_words(rng, self.split, self.length), None
        data = self._documents(task)
        return documents(rng, data, self._question(task, index, data))

    def _documents(self, task: str) -> Documents:
        if self.split != "eval":
            raise UserError(f"{task}: its questions are for evaluation only, split is {self.split!r}")
        files = [data for data in map(read_documents, self.qa) if data.layout == QA_LAYOUT[task]]
        if not files:
            given = ", ".join(self.qa) or "none"
            raise UserError(f"{task}: needs a file in {QA_LAYOUT[task]}'s layout, qa=FILE; given: {given}")
        return files[0]

    def _question(self, task: str, index: int, data: Documents) -> Question:
        """The index-th of the shuffled questions whose own documents fit."""
        if task not in self._fitting:
            order = list(data.questions)
            random.Random(f"{self.seed}:{task}").shuffle(order)
            limit = self.length - NEW_TOKENS[task]
            rng = random.Random(0)
            self._fitting[task] = [], (q for q in order if self._tokens(documents(rng, data, q)[0](0)) <= limit)
        fitting, rest = self._fitting[task]
        while len(fitting) <= index:
            question = next(rest, None)
            if question is None:
                raise UserError(
                    f"{task}: only {len(fitting)} questions fit in {self.length} tokens, expected more than {index}"
                )
            fitting.append(question)
        return fitting[index]
