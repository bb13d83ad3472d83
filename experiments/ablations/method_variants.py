"""`python -m experiments.ablations.method_variants`: methods with one thing changed, on the reference model.

Each variant isolates a cause that docs/results/method_comparison_findings.md names. It is scored beside the method
itself, on the same prompts, in both settings; the differences are paired. `--text FILES` adds ExpectedAttention with
moments of that text. Samples are kept below `--output`, so that an interrupted run continues.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.method_comparison.tables import head
from learnkv import attach, load_policy
from learnkv.allocators import FixedLayers, Uniform
from learnkv.calibration.moments import query_moments
from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.data.text import text_windows
from learnkv.evaluation import runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import Record, estimate, mean_of_tasks, paired_difference
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks import Answers, ruler
from learnkv.formats import layers, tensors
from learnkv.inference.models import load_model
from learnkv.policy.policy import Policy
from learnkv.scorers import ExpectedAttention, ReSTKV, SnapKV

TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "vt")
KEEPS = (0.5, 0.25, 0.1)
UPWARDS = [1 + 38 / 5 * layer for layer in range(6)]
"""The progression of pyramidkv.yaml, beta 20, from the last of the model's six layers to the first."""
WINDOWS = 24
"""Windows of 1,024 tokens that moments are measured on."""
Variants = Mapping[str, tuple[str, Policy]]


class LargestKeys(Scorer):
    """Knorm the other way round."""

    def forward(self, obs: Observation) -> Tensor:
        norm: Tensor = obs.keys.float().norm(dim=-1)
        return norm


def variants(folder: Path, moments: Path | None = None) -> dict[str, tuple[str, Policy]]:
    """By name: the method's own YAML, and the policy that differs from it in one thing."""
    upwards = FixedLayers(str(layers.write(folder / "upwards.json", UPWARDS)))
    found = {
        "pyramidkv, upside down": ("pyramidkv", Policy(SnapKV(), upwards)),
        "snapkv, kernel 31": ("snapkv", Policy(SnapKV(kernel_size=31), Uniform())),
        "snapkv, kernel 5": ("snapkv", Policy(SnapKV(kernel_size=5), Uniform())),
        "snapkv, maximum": ("snapkv", Policy(SnapKV(pooling="max"), Uniform())),
        "restkv, plain mean": ("restkv", Policy(ReSTKV(alpha=None), Uniform())),
        "knorm, largest keys": ("knorm", Policy(LargestKeys(), Uniform())),
        "expected_attention": ("expected_attention_measured", load_policy("expected_attention")),
    }
    if moments is not None:
        other = Policy(ExpectedAttention(moments=str(moments)), Uniform())
        found["expected_attention_measured, other text"] = ("expected_attention_measured", other)
    return found


def table(records: Sequence[Record], beside: Mapping[str, str]) -> Iterator[str]:
    """Score of every policy at every budget, and what a variant gains on the method `beside` it."""
    cells: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        cells.setdefault((record["policy"], record["keep"]), []).append(record)
    yield f"| policy | beside | {' | '.join(f'keep {keep:g}: score · difference' for keep in KEEPS)} |"
    yield f"| --- | --- |{' ---: |' * len(KEEPS)}"
    for name in dict.fromkeys(policy for policy, _ in cells):
        row = []
        for keep in KEEPS:
            by_task: dict[str, list[float]] = {}
            for record in cells[name, keep]:
                by_task.setdefault(record["task"], []).append(record["score"])
            score = mean_of_tasks(map(estimate, by_task.values()))
            text = f"{score.mean:.0f} ± {score.stderr:.0f}"
            if name in beside:
                apart = paired_difference(cells[name, keep], cells[beside[name], keep])
                text += f" · {apart.mean:+.0f} ± {apart.stderr:.0f}"
            row.append(text)
        yield f"| {name} | {beside.get(name, '')} | {' | '.join(row)} |"


def measure(changed: Variants, samples: int, model: object, tokenizer: object, output: Path) -> list[Record]:
    """What the variants and their methods score, in both settings; the methods first."""
    plain = {name: load_policy(name) for name in dict.fromkeys(beside for beside, _ in changed.values())}
    policies = {**plain, **{name: policy for name, (_, policy) in changed.items()}}
    config = EvalConfig(samples=samples, setting=("query_agnostic", "query_aware"))
    family = Answers(ruler.prompts(config, TASKS, 1024, tokenizer), tokenizer)
    jobs = jobs_of(model, policies, [Budget(keep=keep) for keep in KEEPS])[1:]
    store = Store(output / "samples.jsonl")
    runner.run(model, [family], jobs, store, Packing(60))
    return runner.finished([family], jobs, store)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=12, help="prompts of every task")
    parser.add_argument("--text", nargs="*", default=(), help="text, jsonl or parquet files")
    parser.add_argument("--output", type=Path, default=Path("runs/method_variants"), help="folder for samples")
    parser.add_argument("--out", type=Path, default=Path("docs/results/method_variants.md"), help="file for the tables")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("reference")
    attach(model)
    moments = None
    if options.text:
        windows = text_windows(list(options.text), tokenizer, 1024)
        contexts = [windows[at * len(windows) // WINDOWS]["input_ids"][None] for at in range(WINDOWS)]
        moments = options.output / "moments.safetensors"
        tensors.write(moments, query_moments(model, contexts), torch.float16)
    changed = variants(options.output, moments)
    records = measure(changed, options.samples, model, tokenizer, options.output)
    text = f" --text {' '.join(Path(file).name for file in options.text)}" if options.text else ""
    lines = [
        "# Methods with one thing changed",
        "",
        f"Written by `python -m experiments.ablations.method_variants --samples {options.samples}{text}` at commit "
        f"{head()[:7]}:",
        f"model `reference`, {options.samples} prompts each of {', '.join(TASKS)}.",
        "Means over tasks of 0 to 100, and what a variant gains on its method on the same prompts, ± a standard error.",
    ]
    if options.text:
        lines += [f'"Other text": moments of {WINDOWS} windows of 1,024 tokens, spread evenly over the text.']
    for setting in ("query_agnostic", "query_aware"):
        of_setting = [record for record in records if record["setting"] == setting]
        lines += ["", f"## {setting.replace('_', '-').capitalize()}", ""]
        lines += table(of_setting, {name: beside for name, (beside, _) in changed.items()})
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
