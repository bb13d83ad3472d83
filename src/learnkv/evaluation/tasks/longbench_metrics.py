"""LongBench's metrics (Bai et al. 2023, arXiv 2308.14508), 0 to 1, as its own program computes them."""

import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from rapidfuzz import fuzz
from rouge import Rouge

from learnkv.evaluation.tasks.suite import SuiteSample

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
"""As the original has it."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class LongBenchSample(SuiteSample):
    """A sample of LongBench: the best score over its answers.

    Args:
        measure: name of the metric in `METRICS`.
        first_line: only the first line of the output counts.
        classes: names of all classes, for `classification`.
    """

    measure: str = "qa_f1"
    first_line: bool = False
    classes: tuple[str, ...] = ()

    packages: ClassVar[tuple[str, ...]] = ("jieba", "rapidfuzz", "rouge")

    def score(self, prediction: str) -> float:
        if self.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        if self.measure == "classification":
            return max(classification(prediction, answer, self.classes) for answer in self.answers)
        return max(METRICS[self.measure](prediction, answer) for answer in self.answers)

    def complete(self, prediction: str) -> bool:
        return self.first_line and "\n" in prediction.lstrip("\n")


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words in lower case, without punctuation and articles."""
    return _f1(_english_words(prediction), _english_words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the words that jieba finds, without punctuation."""
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """F of ROUGE-L (package `rouge`); 0 where one of the two has no words."""
    try:
        with _recursion(len(prediction.split()) + len(answer.split())):
            scores = Rouge(metrics=["rouge-l"], stats=["f"]).get_scores([prediction], [answer], avg=True)
    except (ValueError, ZeroDivisionError):
        return 0.0
    return float(scores["rouge-l"]["f"])


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L of the words that jieba finds."""
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the output names, if the right one is among them.

    A named class that is a part of the right one's name does not count; as in the original, the class after such a
    one is not looked at.
    """
    named, place = [name for name in classes if name in prediction], 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            del named[place]
        place += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the output's numbers that are the number of the right paragraph."""
    return count(prediction, re.findall(r"\d+", answer)[0])


def count(prediction: str, answer: str) -> float:
    """Share of the output's numbers that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, answer: str) -> float:
    """Similarity by edits of the first line that is no comment, in whole percent."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(line, answer)) / 100 if line and answer else 0.0


METRICS: Mapping[str, Callable[[str, str], float]] = {
    metric.__name__: metric for metric in (qa_f1, qa_f1_zh, rouge_l, rouge_l_zh, retrieval, count, code_sim)
}


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    same = (Counter(prediction) & Counter(answer)).total()
    return 2 * same / (len(prediction) + len(answer)) if same else 0.0


def _english_words(text: str) -> list[str]:
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", letters).split()


def _chinese_words(text: str) -> list[str]:
    unwanted = string.punctuation + CHINESE_PUNCTUATION
    words = ("".join(c for c in word.lower() if c not in unwanted and not c.isspace()) for word in _cut(text))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    import jieba  # reads its dictionary

    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text, cut_all=False))


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Room for the package's recursion over all words: without it long sentences fail, and the original gives 0."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 2 * depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)
