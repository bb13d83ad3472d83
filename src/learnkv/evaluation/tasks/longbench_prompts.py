"""LongBench's tasks: metric, longest answer, and prompts in wording of our own."""

import re
from dataclasses import dataclass

from learnkv.evaluation.tasks.templates import Template


@dataclass(frozen=True)
class Task:
    """A task of LongBench.

    Args:
        measure: name of its metric.
        new_tokens: of its longest answer.
        template: of its prompt.
        first_line: only the first line of an output counts.
        chat: whether a chat template is used; few-shot prompts and code go without.
    """

    measure: str
    new_tokens: int
    template: Template
    first_line: bool = False
    chat: bool = True


_PASSAGES = Template(
    "Below are several passages, and after them a question about them.\n\n{context}\n\n",
    "Answer the question from the passages above with a few words and no explanation.\n\nQuestion: {input}\n",
    "Answer:",
)
_CODE = "Continue this code with its next line.\n\n{context}"
_NEXT = "Next line of code:\n"
_PASSAGES_ZH = Template(
    "下面是一些文章，之后有一个与它们有关的问题。\n\n{context}\n\n",
    "请根据上面的文章回答问题，只写答案。\n\n问题：{input}\n",
    "回答：",
)

TASKS: dict[str, Task] = {
    "narrativeqa": Task(
        "qa_f1",
        128,
        Template(
            "Read this story, a novel or a script of a film.\n\n{context}\n\n",
            "Answer the question about the story with as few words as possible and no explanation.\n\n"
            "Question: {input}\n",
            "Answer:",
        ),
    ),
    "qasper": Task(
        "qa_f1",
        128,
        Template(
            "Read this scientific paper.\n\n{context}\n\n",
            'Answer the question about the paper with a phrase or one sentence; with "yes" or "no" where it asks for '
            'that, and with "unanswerable" where the paper has no answer. Do not explain.\n\nQuestion: {input}\n',
            "Answer:",
        ),
    ),
    "multifieldqa_en": Task(
        "qa_f1",
        64,
        Template(
            "Read this text.\n\n{context}\n\n",
            "Answer the question about the text. Write the answer and nothing else.\n\nQuestion: {input}\n",
            "Answer:",
        ),
    ),
    "hotpotqa": Task("qa_f1", 32, _PASSAGES),
    "2wikimqa": Task("qa_f1", 32, _PASSAGES),
    "musique": Task("qa_f1", 32, _PASSAGES),
    "gov_report": Task(
        "rouge_l",
        512,
        Template(
            "This is a report of a government agency.\n\n{context}\n\n",
            "Summarize the report on one page.\n\n",
            "Summary:",
        ),
    ),
    "qmsum": Task(
        "rouge_l",
        512,
        Template(
            "This is the transcript of a meeting.\n\n{context}\n\n",
            "Do what this request about the meeting asks for, in one sentence or more.\n\nRequest: {input}\n",
            "Answer:",
        ),
    ),
    "multi_news": Task(
        "rouge_l",
        512,
        Template(
            "These are several news articles.\n\n{context}\n\n",
            "Summarize all of the articles together on one page.\n\n",
            "Summary:",
        ),
    ),
    "trec": Task(
        "classification",
        64,
        Template("Name the type of each question. First some examples.\n\n{context}", "\n{input}"),
        True,
        False,
    ),
    "triviaqa": Task(
        "qa_f1",
        32,
        Template(
            "Answer each question from its passage, with the answer alone. First some examples.\n\n{context}\n\n",
            "{input}",
        ),
        True,
        False,
    ),
    "samsum": Task(
        "rouge_l",
        128,
        Template("Summarize each dialogue in a few short sentences. First some examples.\n\n{context}\n\n", "{input}"),
        True,
        False,
    ),
    "passage_count": Task(
        "count",
        32,
        Template(
            "These paragraphs are from Wikipedia, and some of them occur more than once.\n\n{context}\n\n",
            "How many different paragraphs are there? Count a paragraph that occurs again only once, and write the "
            "number alone.\n\n",
            "The number of different paragraphs is",
        ),
    ),
    "passage_retrieval_en": Task(
        "retrieval",
        32,
        Template(
            "These are 30 numbered paragraphs from Wikipedia.\n\n{context}\n\n",
            "Which of the paragraphs does this abstract summarize?\n\n{input}\n\n"
            'Write its number, for example "Paragraph 7".\n\n',
            "The abstract is of",
        ),
    ),
    "lcc": Task("code_sim", 64, Template(_CODE, "", _NEXT), chat=False),
    "repobench-p": Task("code_sim", 64, Template(_CODE, "{input}", _NEXT), chat=False),
    "multifieldqa_zh": Task("qa_f1_zh", 64, _PASSAGES_ZH),
    "dureader": Task("rouge_l_zh", 128, _PASSAGES_ZH),
    "vcsum": Task(
        "rouge_l_zh",
        512,
        Template("下面是一次会议的记录。\n\n{context}\n\n", "请写出这次会议的总结。\n\n", "会议总结："),
    ),
    "lsht": Task(
        "classification", 64, Template("请判断每条新闻的类别。先看一些例子。\n\n{context}\n", "{input}"), True, False
    ),
    "passage_retrieval_zh": Task(
        "retrieval",
        32,
        Template(
            "下面是一些编了号的段落。\n\n{context}\n\n",
            "下面的摘要出自哪一个段落？\n\n{input}\n\n请写出段落的编号，例如“段落7”。\n\n",
            "答案是",
        ),
    ),
}
CUE = re.compile(r"(Type|Answer|Summary|类别)[:：]\s*\Z")
"""The end of a few-shot input, after which the model answers."""
