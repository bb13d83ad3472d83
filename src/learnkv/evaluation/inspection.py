"""`learnkv inspect --ckpt PATH text=FILE question=…`: what policies keep of a text, as a page."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from learnkv.data.documents import read_document
from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation import runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.config import EvalConfig, Setting
from learnkv.evaluation.html.page import Contents, write_page
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import Record
from learnkv.evaluation.run import environment, load_policies, policy_paths
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.answers import Answers, tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.typed_command import typed_command
from learnkv.formats.files import make_folder
from learnkv.inference.attention import attach
from learnkv.inference.models import context_length, describe_model, load_model
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy


@dataclass(frozen=True)
class InspectConfig:
    """Show what compression policies keep of a text, and what the model answers from it, as a page.

    Args:
        ckpt: policies, as for `learnkv eval`.
        baselines: methods to compare with, as for `learnkv eval`.
        text: text file (.gz too), of at most the model's context.
        question: what is asked about it.
        answer: the correct answer, if there is to be a score: the answers contain it or not.
        answer_prefix: beginning of the answer, which the model continues.
        model: hub id, folder, or `reference`.
        revision: branch, tag or commit of a hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:N or mps.
        attn: transformers' attention implementation.
        keep: fractions of the prompt's entries to keep (default 0.1 where no budget is given).
        budget: entries to keep per head on average, in tokens.
        bytes: what the cache may take, as for `learnkv eval`.
        setting: query_agnostic reads the question after compression, query_aware before it.
        max_new_tokens: most tokens of an answer.
        out: the page to write.
        allow: module prefixes besides learnkv whose classes a policy's file may name.
    """

    ckpt: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    text: str = ""
    question: str = ""
    answer: str = ""
    answer_prefix: str = ""
    model: str = "reference"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"
    keep: tuple[float, ...] = ()
    budget: tuple[int, ...] = ()
    bytes: tuple[float | str, ...] = ()
    setting: tuple[Setting, ...] = ("query_agnostic",)
    max_new_tokens: int = 64
    out: str = "inspect.html"
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("text", "question"):
            if not getattr(self, key).strip():
                raise UserError(f"{key}=: expected {'a file' if key == 'text' else 'a question'}, got nothing")
        if not self.ckpt and not self.baselines:
            raise UserError("ckpt=: expected policies, got none")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if Path(self.out).suffix != ".html":
            raise UserError(f"out={self.out}: expected a file ending in .html")
        assert self.evaluation  # a malformed key raises

    @property
    def evaluation(self) -> EvalConfig:
        """The keys that an evaluation has, too."""
        keeps = self.keep or (() if self.budget or self.bytes else (0.1,))
        return EvalConfig(
            ckpt=self.ckpt,
            baselines=self.baselines,
            keep=keeps,
            budget=self.budget,
            bytes=self.bytes,
            setting=self.setting,
            allow=self.allow,
        )


class Unscored(Sample):
    """A question without a correct answer: the model's answer ends by itself or at its limit, and has no score."""

    def score(self, prediction: str) -> float:
        return 0.0

    def complete(self, prediction: str) -> bool:
        return False


def inspect_text(config: InspectConfig, resolved: str) -> None:
    """Write the page and print its path."""
    context = read_document(config.text, "text")
    if not context.strip():
        raise UserError(f"text={config.text}: expected text, the file has none")
    for path in policy_paths(config.evaluation):
        load_policy(path, config.allow)  # a missing file is an error before a large model is loaded
    make_folder(Path(config.out).expanduser().parent, "out")
    model, tokenizer = load_model(config.model, config.revision, config.dtype, config.device, config.attn)
    attach(model)
    policies = load_policies(config.evaluation, model)
    prompts = _prompts(config, context, tokenizer, context_length(model))
    records = _measured(config, model, Answers(prompts, tokenizer), policies)
    about = Contents(
        title=f"What is kept of {Path(config.text).name}",
        model=describe_model(model)["id"],
        environment=environment(model, tokenizer),
        records=records,
        scored=bool(config.answer),
        notes=[f"{name}: {policy.other_weights}" for name, policy in policies.items() if policy.other_weights],
        command=typed_command("learnkv inspect", config),
        config=resolved,
    )
    print(write_page(Path(config.out), about))


def _prompts(config: InspectConfig, context: str, tokenizer: Any, longest: int | None) -> list[Prompt]:
    """The prompt in every setting. Raises UserError where the model cannot read it."""
    kind, answers = (Sample, [config.answer]) if config.answer else (Unscored, [])
    prefix = f" {config.answer_prefix}" if config.answer_prefix else ""
    sample = kind(context, f"\n\n{config.question}", prefix, answers, Path(config.text).name, config.max_new_tokens)
    prompts = [prompt for setting in config.setting for prompt in tokenised([(0, sample)], setting, 0, tokenizer)]
    prompts = [replace(prompt, length=len(prompt.prefill_ids) + len(prompt.suffix_ids)) for prompt in prompts]
    for prompt in prompts:
        if longest is not None and prompt.room > longest:
            raise UserError(
                f"text={config.text}: {prompt.room} tokens with the question and room for the answer, "
                f"the model's context is {longest}"
            )
    return prompts


def _measured(config: InspectConfig, model: Any, family: Answers, policies: Mapping[str, Policy]) -> list[Record]:
    """Records of every policy and budget with what was kept."""
    jobs = jobs_of(model, policies, config.evaluation.budgets)
    with TemporaryDirectory() as folder:
        store = Store(Path(folder) / "samples.jsonl")
        runner.run(model, [family], jobs, store, Packing(1), viewer=len(family.prompts))
        return runner.finished([family], jobs, store)
