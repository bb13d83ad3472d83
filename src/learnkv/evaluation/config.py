"""The keys of `learnkv eval`."""

from dataclasses import dataclass, field
from typing import Literal

from learnkv.data.ruler_needles import Template
from learnkv.data.words import Language
from learnkv.errors import UserError
from learnkv.evaluation.budget import Budget, bytes_budget
from learnkv.evaluation.fidelity import TASK as FIDELITY
from learnkv.evaluation.fidelity import Gate
from learnkv.evaluation.precisions import check_precisions
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.persistence.wandb_options import Wandb

Setting = Literal["query_agnostic", "query_aware"]
Metric = Literal["generated", "forced"]
Measured = Literal["generated", "forced", "choices"]
"""What an output is: generated, the correct answer that was read, or the most likely of the choices that were read."""


@dataclass(frozen=True)
class EvalConfig:
    """Compare KV-cache compression policies on one model, beside the full cache.

    Args:
        ckpt: policies: Lightning checkpoint, folder of an exported policy or of a run, heuristic's YAML or its bare
            name, `reference`, or `owner/name` of a policy on the Hugging Face hub. `@K4V3` behind a path stores what
            the policy keeps at that precision.
        baselines: methods of configs/policies to compare with: names, `all`, or kinds (trained, calibrated,
            extra_passes, online, pages, observation_window); `-` before a word leaves out, as in `all,-online`.
        model: hub id, folder, or `reference`.
        revision: branch, tag or commit of a hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu, cuda, cuda:N or mps.
        attn: transformers' attention implementation.
        keep: fractions of the prompt's entries to keep (default 0.5,0.25,0.1,0.05 where no budget is given).
        budget: entries to keep per head on average, in tokens.
        bytes: what the cache of a prompt may take: fractions of its entries' bytes at 16 bits, as in 0.05, or numbers
            of bytes, as in 64MB (1 MB = 1,024² bytes). Codes, scales, positions and tables count.
        precision: bits (16, 8, 4, 3, 2, or K4V3 for keys and values) at which the baselines without training are run,
            each at every one, or shares of tiers as in K4V2:0.75+K8V3:0.25; with keep= or bytes=. Beside them the whole
            cache at fewer than 16.
        tasks: RULER's task names, `niah` or `ruler` for groups of them, `text`, `fidelity`, suites or their tasks
            (longbench, longbench_qasper …), or tables: a hub id or a jsonl, csv or parquet file with the columns
            context, question, answer_prefix, answer, task, max_new_tokens.
        lengths: prompt lengths in tokens, the answer included.
        setting: query_agnostic reads the question after compression, query_aware before it.
        score: generated scores the answers in what the model generates; forced reads the correct answer in one pass and
            gives the share of prompts whose every token is ranked first, and the KL from the full cache.
        draft_tokens: tokens to draft per round of lossless decoding with every policy; the mean number of accepted ones
            becomes a column. 0: not measured.
        samples: prompts per task and length.
        batch_size: most prompts per prefill.
        batch_tokens: most tokens per prefill: prompts times the longest, its answer included; 16384 where neither this
            nor batch_size is given.
        answers: prompts whose answers are written at once, policies side by side: faster where most of a token's time
            goes into reading weights; tokens per second are then not measured. Default: one policy after the other.
        devices: processes that share out the prompts, each with a GPU of its own where there are GPUs.
        text: hub id or text, jsonl or parquet file for the task `text`.
        haystack: text file that needles are hidden in, for the niah tasks with essays; default: CPython's help topics.
        template: wording of needles and questions: secret, or memo, which no training uses.
        keys: language of the needles' keys, where they are words: english, german or greek.
        qa: files for qa_1 (SQuAD's layout) and qa_2 (HotpotQA's layout).
        suite: rows and prompts of the other suites.
        output: folder for results; the same command continues an interrupted run, another one adds to the table.
        show: prompts to print with what was expected and what came of every policy.
        viewer: prompts that `report.html` shows with the tokens that every head kept.
        wandb: options of Weights & Biases, such as wandb.mode=offline; default: nothing is logged.
        gate: limits on the results of the task `fidelity`, such as gate.kl=0.05; exit code 1 where one is exceeded.
        seed: random seed.
        allow: module prefixes besides learnkv whose classes a policy's file may name.
    """

    ckpt: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    model: str = "reference"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"
    keep: tuple[float, ...] = ()
    budget: tuple[int, ...] = ()
    bytes: tuple[float | str, ...] = ()
    precision: tuple[int | str, ...] = ()
    tasks: tuple[str, ...] = ("ruler",)
    lengths: tuple[int, ...] = (1024,)
    setting: tuple[Setting, ...] = ("query_agnostic",)
    score: Metric = "generated"
    draft_tokens: int = 0
    samples: int = 50
    batch_size: int | None = None
    batch_tokens: int | None = None
    answers: int | None = None
    devices: int = 1
    text: str | None = None
    haystack: str | None = None
    template: Template = "secret"
    keys: Language = "english"
    qa: tuple[str, ...] = ()
    suite: SuiteKeys = field(default_factory=SuiteKeys)
    output: str = "runs/eval"
    show: int = 0
    viewer: int = 3
    wandb: Wandb | None = None
    gate: Gate | None = None
    seed: int = 42
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for keep in self.keep:
            if not 0 < keep <= 1:
                raise UserError(f"keep={keep:g}: expected a fraction of the prompt's entries, above 0 and at most 1")
        for key in ("budget", "lengths", "samples", "batch_size", "batch_tokens", "answers", "devices"):
            value = getattr(self, key)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number < 1:
                    raise UserError(f"{key}={number}: expected at least 1")
        if self.draft_tokens < 0:
            raise UserError(f"draft_tokens={self.draft_tokens}: expected a number of tokens, at least 0")
        for key in ("show", "viewer"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)}: expected a number of prompts, at least 0")
        for key in ("tasks", "lengths", "setting"):
            if not getattr(self, key):
                raise UserError(f"{key}=: expected at least one, got none")
        self._check_precision()
        if self.gate is not None and FIDELITY not in self.tasks:
            raise UserError(f"gate: expected tasks=fidelity to check, got tasks={','.join(self.tasks)}")
        assert self.budgets  # a malformed one raises

    def _check_precision(self) -> None:
        """UserError for a precision that there is not, or with nothing that could be run at it."""
        check_precisions(self.precision)
        typed = f"precision={','.join(map(str, self.precision))}"
        if self.precision and not self.baselines:
            raise UserError(f"{typed}: expected baselines= to run at it, got none")
        if self.precision and (self.budget or not (self.keep or self.bytes)):
            raise UserError(f"{typed}: expected keep= or bytes=, got {'budget=' if self.budget else 'neither'}")

    @property
    def budgets(self) -> list[Budget]:
        """The budgets of every policy, by kind, the largest first."""
        keeps = self.keep or (() if self.budget or self.bytes else (0.5, 0.25, 0.1, 0.05))
        entries = [*(Budget(keep=keep) for keep in keeps), *(Budget(tokens=tokens) for tokens in self.budget)]
        return sorted({*entries, *map(bytes_budget, self.bytes)}, key=lambda budget: budget.order)
