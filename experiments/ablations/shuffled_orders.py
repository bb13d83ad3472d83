"""`python -m experiments.ablations.shuffled_orders --text FILES`: the worth of the order within heads on held-out text.

Each method beside itself with the heads of one layer at random: every head keeps as many entries as before, which ones
is drawn. The table has the KL to the full cache's next-token distributions, on the reference model. Where a draw is
better than the method's order, heads average over the prompt, and the highest scores are no fair part of it.
`learned` is the policy that ships as `reference`, and stands there without the noise that it has learned, too. Samples
are kept below `--output`, so that an interrupted run continues.
"""

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.method_comparison.tables import head
from learnkv import attach, load_policy
from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer, Scores
from learnkv.evaluation import runner, tasks
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.budget import Budget
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.results import FULL, Estimate, Record, estimate
from learnkv.evaluation.store import Store
from learnkv.inference.models import load_model
from learnkv.policy.policy import Policy
from learnkv.scorers import LearnedScorer, Random

METHODS = ("snapkv", "expected_attention", "headkv", "kvzip", "fast_kvzip", "learned")
UNSAMPLED = "learned, without its noise"
KEEPS = (0.25, 0.1)
LENGTH = 1024


class Shuffled(Scorer):
    """Budgets by `base`; within the heads of these layers, entries at random."""

    def __init__(self, base: Scorer, layers: Sequence[int]) -> None:
        super().__init__()
        self.base, self.layers, self.noise = base, tuple(layers), Random()
        self.needs, self.window, self.reads_budget = base.needs, base.window, base.reads_budget
        self.extra_passes = base.extra_passes

    def forward(self, obs: Observation) -> Tensor:
        return self.base(obs)

    def score(self, obs: Observation) -> Scores:
        return self.base.score(obs)

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        return self.noise(obs) if obs.layer_idx in self.layers else self.base.refine(obs, scores, budgets)


def unsampled(policy: Policy) -> Policy:
    """A learned policy whose heads keep their highest scores."""
    plain = copy.deepcopy(policy)
    assert isinstance(plain.scorer, LearnedScorer)
    assert plain.scorer.sampling_growth is not None
    plain.scorer.sampling_growth.data.fill_(-1.0)  # the least that a scale can be
    return plain


def policies_of(methods: Sequence[str], layers: int) -> dict[str, Policy]:
    """Every method as it is, and with one layer after the other at random."""
    plain = {name: load_policy("reference" if name == "learned" else name) for name in methods}
    if "learned" in plain:
        plain[UNSAMPLED] = unsampled(plain["learned"])
    found = dict(plain)
    for name, policy in plain.items():
        assert policy.scorer is not None
        for layer in range(layers):
            scorer = Shuffled(policy.scorer, [layer])
            found[f"{name}, layer {layer}"] = Policy(scorer, policy.allocator, policy.sinks, policy.recent)
    return found


def table(records: Sequence[Record], names: Sequence[str], layers: int, keep: float) -> Iterator[str]:
    """KL of every method as it is, and what changes with one layer at random, paired by window."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record["policy"] != FULL and record["keep"] == keep:
            found.setdefault(record["policy"], {})[record["index"]] = record["kl"]
    yield f"| keep {keep:g} | KL | {' | '.join(f'layer {layer} at random' for layer in range(layers))} |"
    yield f"| --- | ---: |{' ---: |' * layers}"
    for name in names:
        own = found[name]
        others = [found[f"{name}, layer {layer}"] for layer in range(layers)]
        apart = [estimate([other[index] - own[index] for index in own]) for other in others]
        yield f"| {name} | {_pm(estimate(list(own.values())))} | {' | '.join(_pm(one, '+') for one in apart)} |"


def _pm(one: Estimate, sign: str = "") -> str:
    return f"{one.mean:{sign}.4f} ± {one.stderr:.4f}"


def measure(
    policies: Mapping[str, Policy], config: EvalConfig, model: object, tokenizer: object, folder: Path
) -> list[Record]:
    """What every policy loses on every window."""
    families = tasks.load(config, tokenizer, None)
    jobs = jobs_of(model, policies, [Budget(keep=keep) for keep in KEEPS])
    store = Store(folder / "samples.jsonl")
    runner.run(model, families, jobs, store, Packing(config.batch_size))
    return runner.finished(families, jobs, store)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="windows")
    parser.add_argument("--text", required=True, help="text, jsonl or parquet files")
    parser.add_argument("--output", type=Path, default=Path("runs/shuffled_orders"), help="folder for samples")
    parser.add_argument("--out", type=Path, default=Path("docs/results/shuffled_orders.md"), help="file for the tables")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("reference")
    attach(model)
    layers = model.config.num_hidden_layers
    policies = policies_of(METHODS, layers)
    names = [name for name in policies if ", layer " not in name]
    config = EvalConfig(
        model="reference",
        tasks=("text",),
        text=options.text,
        samples=options.samples,
        lengths=(LENGTH,),
        setting=("query_agnostic",),
        batch_size=options.samples,
    )
    records = measure(policies, config, model, tokenizer, options.output)
    lines = [
        "# What the order within heads is worth on held-out text",
        "",
        f"Written by `python -m experiments.ablations.shuffled_orders --text {Path(options.text).name}` at commit "
        f"{head()[:7]}:",
        f"KL to the full cache in nats per token on the reference model, {options.samples} windows, and what is added",
        "to it when the heads of one layer keep as many entries as before, drawn at random. ± is one standard error.",
        "",
    ]
    for keep in KEEPS:
        lines += [*table(records, names, layers, keep), ""]
    scorer = policies["learned"].scorer
    assert isinstance(scorer, LearnedScorer)
    start = f"{scorer.sampling:g} at the start"
    lines += [f"Scale of the noise that each head of `learned` has learned, beside {start}:", "", *scales(scorer)]
    options.out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print("\n".join(lines))


def scales(scorer: LearnedScorer) -> Iterator[str]:
    """A row per layer, a column per head."""
    found = scorer.sampling_scales().squeeze(-1)
    yield f"| layer | {' | '.join(f'head {head}' for head in range(found.shape[1]))} |"
    yield f"| ---: |{' ---: |' * found.shape[1]}"
    for layer, row in enumerate(found.tolist()):
        yield f"| {layer} | {' | '.join(f'{one:.2f}' for one in row)} |"


if __name__ == "__main__":
    with torch.no_grad():
        main()
