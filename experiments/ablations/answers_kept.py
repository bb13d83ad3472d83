"""`python -m experiments.ablations.answers_kept`: why methods score as they do on the reference model.

Its answers are copied by a few heads: the three kv heads with the highest head scores have three quarters of their
sum. For every method of the comparison, at a few budgets: the fraction of the answer's tokens that these heads keep,
the rank of these tokens in their order (1: first), the fraction of all entries that these heads keep, and the score of
the method on the same tasks. The context is compressed before the question is read, or
after it with `--setting query_aware`.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import correlation, fmean
from typing import Any, get_args

import torch

from learnkv import load_policy, prefill
from learnkv.core.plan import Plan
from learnkv.evaluation.config import EvalConfig, Setting
from learnkv.evaluation.tasks import ruler
from learnkv.formats import headkv
from learnkv.formats.files import locate
from learnkv.inference.models import load_model
from learnkv.persistence.methods import select_methods
from learnkv.policy.policy import Policy

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multikey_2")
KEEPS = (0.5, 0.25, 0.1)
HEADS = 3
Figures = tuple[float, float, float]


def retrieving(group: int, count: int = HEADS) -> list[tuple[int, int]]:
    """The kv heads (layer, head) with the highest mean scores of their `group` query heads."""
    scores = headkv.mean_scores(headkv.read(locate("reference", "head_scores.json"))).unflatten(1, (-1, group)).mean(-1)
    return [divmod(at, scores.shape[1]) for at in scores.flatten().topk(count).indices.tolist()]


def answer_tokens(pieces: Sequence[str], answer: str) -> list[int]:
    """Places of the tokens `pieces` that the first occurrence of `answer` in their text lies in."""
    begin = "".join(pieces).index(answer)
    spans = pairwise(accumulate(map(len, pieces), initial=0))
    return [at for at, (first, end) in enumerate(spans) if end > begin and first < begin + len(answer)]


def figures(plan: Plan, heads: Sequence[tuple[int, int]], answer: Sequence[int]) -> Figures:
    """Of a plan for one prompt: part of the answer that `heads` keep, its place in their order, part that they keep."""
    scores, budgets = plan.scores[:, 0], plan.budgets[:, 0]
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    entries = scores.shape[-1]
    of_head = [
        (
            (place[head][list(answer)] < budgets[head]).float().mean().item(),
            1 - place[head][list(answer)].float().mean().item() / (entries - 1),
            budgets[head].item() / entries,
        )
        for head in heads
    ]
    return _mean(of_head)


def _mean(each: Sequence[Figures]) -> Figures:
    kept, first, share = (fmean(one) for one in zip(*each, strict=True))
    return kept, first, share


def measure(policies: Mapping[str, Policy], samples: int, setting: Setting) -> dict[tuple[str, float], Figures]:
    """Means by policy and fraction kept, over `samples` prompts of every task."""
    model, tokenizer = load_model("reference")
    heads = retrieving(model.config.num_attention_heads // model.config.num_key_value_heads)
    found: dict[tuple[str, float], list[Figures]] = defaultdict(list)
    for prompt in ruler.prompts(EvalConfig(samples=samples, setting=(setting,)), TASKS, 1024, tokenizer):
        assert prompt.sample is not None
        cache = prefill(model, torch.tensor([prompt.prefill_ids]), window=0, policies=policies.values())
        answer = answer_tokens([tokenizer.decode([token]) for token in prompt.prefill_ids], prompt.sample.answers[0])
        for name, policy in policies.items():
            for keep in KEEPS:
                found[name, keep].append(figures(policy.plan(cache.fork(), keep), heads, answer))
    return {which: _mean(each) for which, each in found.items()}


def mean_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 on; equal values share the mean of theirs."""
    return [sum(x < value for x in values) + (sum(x == value for x in values) - 1) / 2 for value in values]


def scores_of(comparison: Mapping[str, Any], setting: Setting) -> dict[tuple[str, float], float]:
    """Scores by policy and fraction kept, over the same tasks."""
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in comparison["rows"]:
        if row["setting"] == setting and row["task"] in TASKS:
            found[row["policy"], row["keep"]].append(row["score"])
    return {which: fmean(each) for which, each in found.items()}


def table(found: Mapping[tuple[str, float], Figures], scores: Mapping[tuple[str, float], float]) -> Iterator[str]:
    """Lines of a table, the methods that keep most of the answers at the middle budget first."""
    names = sorted({name for name, _ in found}, key=lambda name: -found[name, KEEPS[1]][0])
    yield f"| policy | place | {' | '.join(f'keep {keep:g}: answer · head · score' for keep in KEEPS)} |"
    yield f"| --- | ---: |{' ---: |' * len(KEEPS)}"
    for name in names:
        cells = []
        for keep in KEEPS:
            kept, _, share = found[name, keep]
            cells.append(f"{kept:.2f} · {share:.2f} · {scores.get((name, keep), float('nan')):.0f}")
        yield f"| {name} | {found[name, KEEPS[1]][1]:.2f} | {' | '.join(cells)} |"
    both = [which for which in found if which in scores]
    if len(both) > 1:
        alike = correlation(
            mean_ranks([found[which][0] for which in both]), mean_ranks([scores[which] for which in both])
        )
        yield ""
        yield f"Rank correlation of the answer's part that is kept with the score, over {len(both)} cells: {alike:.2f}."


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=5, help="prompts of every task")
    parser.add_argument("--setting", choices=get_args(Setting), default="query_agnostic")
    parser.add_argument(
        "--comparison", type=Path, default=Path("docs/results/method_comparison.json"), help="file with the scores"
    )
    arguments = parser.parse_args(argv)
    names = select_methods(["all", "-online", "-pages"])
    scores = scores_of(json.loads(arguments.comparison.read_text(encoding="utf-8")), arguments.setting)
    policies = {name: load_policy(name) for name in names}
    print("\n".join(table(measure(policies, arguments.samples, arguments.setting), scores)))


if __name__ == "__main__":
    main()
