"""learnkv and kvpress side by side: kept sets, KL, scores, bytes and decode time on the same weights and prompts.

`python -m experiments.kvpress_comparison --python PATH` writes docs/results/kvpress.md and .json. PATH is the
interpreter of an environment with kvpress 0.5.5 and torch; the two exchange files, neither imports the other.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.results import revision
from experiments.kvpress_comparison.methods import METHODS
from experiments.kvpress_comparison.page import page
from learnkv import attach, generate, load_policy, prefill
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.results import estimate
from learnkv.evaluation.tasks import ruler
from learnkv.evaluation.tasks.answers import eos_tokens
from learnkv.inference.generate import continuation
from learnkv.inference.models import load_model

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
NAME = "experiments.kvpress_comparison"
TIE = 1e-5
"""Relative difference of scores that rounding in another order makes."""
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multiquery", "vt")
KEEPS = (0.5, 0.1)


@dataclass
class Side:
    """What one library makes of all prompts with one method at one budget."""

    kl: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Compare and write the report."""
    options, commit = arguments(argv), revision()
    torch.set_num_threads(1)
    model, tokenizer = load_model("reference", dtype="float32", device="cpu")
    attach(model)
    config = EvalConfig(tasks=TASKS, samples=options.samples, lengths=(1024,))
    prompts = ruler.prompts(config, TASKS, 1024, tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        request = prepare(folder, model, prompts, options)
        if options.python is not None:
            command = [str(options.python), "-m", "experiments.kvpress_comparison.peer", str(folder)]
            subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        theirs = json.loads((folder / "answer.json").read_text())
        kept = dict(np.load(folder / "kept.npz"))
        rows = compare(model, tokenizer, prompts, request, theirs, kept)
        steps = timed(folder / "long", request["long"])
    report = {
        "command": f"python -m {NAME} --python PATH --samples {options.samples} --long {options.long}",
        "commit": commit,
        "versions": theirs["versions"],
        "prompts": len(prompts),
        "rows": rows,
        "steps": [
            {
                "method": name,
                "keep": 1.0 if name == "none" else options.keep,
                "theirs": theirs["steps"][name],
                "ours": ours,
            }
            for name, ours in steps.items()
        ],
        "long": {"prompt": options.long, "layers": 8, "query_heads": 8, "kv_heads": 2, "head_dim": 64},
        "notes": {name: method.note for name, method in METHODS.items()},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kvpress.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.out / "kvpress.md").write_text("\n".join(page(report)).rstrip() + "\n", encoding="utf-8")
    print(options.out / "kvpress.md")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", type=Path, help="interpreter with kvpress; not given: --folder holds its answer")
    parser.add_argument("--samples", type=int, default=2, help="prompts per task")
    parser.add_argument("--long", type=int, default=4096, help="tokens of the prompt for bytes and times")
    parser.add_argument("--keep", type=float, default=0.1, help="fraction kept there")
    parser.add_argument("--folder", type=Path, help="where files are exchanged, kept afterwards")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    return parser.parse_args(argv)


def prepare(folder: Path, model: Any, prompts: list[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Write both models and the request; the answer along which KL is measured is the full cache's own."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * options.long,
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "long")
    ends = sorted(eos_tokens(model))
    told = []
    for prompt in prompts:
        cache = prefill(model, torch.tensor([prompt.prefill_ids]), window=0)
        (said,) = generate(model, torch.tensor([prompt.suffix_ids]), cache, max_new_tokens=32).tolist()
        said = said[: next((at + 1 for at, token in enumerate(said) if token in ends), len(said))]
        new = len(said) + 8
        told.append({"read": prompt.prefill_ids, "then": prompt.suffix_ids, "answer": said, "new": new, "ends": ends})
    ids = torch.randint(1, 128, (options.long,), generator=torch.Generator().manual_seed(1)).tolist()
    request = {
        "methods": {name: method.press for name, method in METHODS.items()},
        "keeps": KEEPS,
        "prompts": told,
        "long": {"read": ids, "keep": options.keep, "steps": 16},
    }
    (folder / "request.json").write_text(json.dumps(request))
    return request


def compare(
    model: Any, tokenizer: Any, prompts: list[Any], request: Row, theirs: Row, kept: dict[str, np.ndarray]
) -> list[Row]:
    """A row per method and budget: theirs, ours with equal definitions, and ours as shipped."""
    shipped = {name: load_policy(method.shipped) for name, method in METHODS.items()}
    policies = [method.policy for method in METHODS.values()]
    said = {(row["method"], row["keep"], row["prompt"]): row for row in theirs["rows"]}
    sides: dict[tuple[str, float, str], Side] = {}
    counts: dict[tuple[str, float], list[Row]] = {}
    for at, (prompt, told) in enumerate(zip(prompts, request["prompts"], strict=True)):
        cache = prefill(model, torch.tensor([told["read"]]), policies=[*policies, *shipped.values()])
        wanted = _logits(model, cache.fork(), told)
        for name, method in METHODS.items():
            for keep in request["keeps"]:
                known = said[name, keep, at]
                entries = len(told["read"])
                found = np.unpackbits(kept[f"{name} {keep:g} {at}"], axis=-1, count=entries).astype(bool)
                budget = float(found.sum()) / found[..., 0].size
                theirs_side = sides.setdefault((name, keep, "theirs"), Side())
                _add(theirs_side, known["kl"], _score(tokenizer, prompt, known["said"]), known["bytes"])
                for kind, policy in (("ours", method.policy), ("shipped", shipped[name])):
                    fork = policy.compress(cache.fork(), budget=budget)
                    if kind == "ours":
                        scores = policy.plan(cache.fork(), budget=budget).scores[:, 0].numpy()
                        counts.setdefault((name, keep), []).append(differing(mask(fork, entries), found, scores))
                    logits = _logits(model, fork.fork(), told)
                    kl = float((wanted.exp() * (wanted - logits)).sum(-1).mean())
                    size = fork.nbytes
                    then = torch.tensor([told["then"]])
                    (new,) = generate(model, then, fork, max_new_tokens=told["new"]).tolist()
                    _add(sides.setdefault((name, keep, kind), Side()), kl, _score(tokenizer, prompt, new), size)
    return [_row(name, keep, found, sides) for (name, keep), found in counts.items()]


def mask(cache: CompressedCache, entries: int) -> np.ndarray:
    """[L, H, S] which entries of a prompt are kept."""
    layers = cache.compressed_layers()
    found = np.zeros((len(layers), layers[0].heads, entries), dtype=bool)
    for at, layer in enumerate(layers):
        for head in range(layer.heads):
            found[at, head, layer.kept_positions(0, head).numpy()] = True
    return found


def differing(mine: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> Row:
    """How two kept sets [L, H, S] differ, and how many of the differences are ties.

    Entries are tied where the scores that compete for the last places of a head are closer than rounding.
    """
    other = mine != theirs
    least = np.where(mine, scores, np.inf).min(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # protected entries are above all others, and tied with nothing
        tied = np.abs(scores - least) <= TIE * np.abs(least)
    return {
        "differ": int((other & theirs).sum()),
        "untied": int((other & theirs & ~tied).sum()),
        "entries": int(theirs.sum()),
        "spent": float(theirs.mean()),
    }


def timed(folder: Path, long: Row) -> dict[str, Row]:
    """Bytes held and milliseconds of CPU time per decode step of every method, and without compression."""
    model = attach(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval())
    policies = {name: method.policy for name, method in METHODS.items()}
    cache = prefill(model, torch.tensor([long["read"]]), policies=policies.values())
    found = {}
    for name, policy in {"none": None, **policies}.items():
        fork = cache.fork() if policy is None else policy.compress(cache.fork(), keep=long["keep"])
        size = cache.full_nbytes if policy is None else fork.nbytes
        spent = []
        for _ in range(2 + long["steps"]):
            begin = time.process_time()
            continuation(model, torch.tensor([[1]]), fork)
            spent.append(1e3 * (time.process_time() - begin))
        found[name] = {"bytes": size, "ms": sorted(spent[2:])[long["steps"] // 2]}
    return found


def _row(name: str, keep: float, found: list[Row], sides: dict[Any, Side]) -> Row:
    row: Row = {"method": name, "keep": keep, "spent": fmean(one["spent"] for one in found)}
    row["equal"] = sum(one["differ"] == 0 for one in found)
    row |= {key: sum(one[key] for one in found) for key in ("differ", "untied", "entries")}
    for kind in ("theirs", "ours", "shipped"):
        side = sides[name, keep, kind]
        kl, score = estimate(side.kl), estimate(side.score)
        row[kind] = {
            "kl": kl.mean,
            "kl_stderr": kl.stderr,
            "score": score.mean,
            "score_stderr": score.stderr,
            "bytes": fmean(side.size),
        }
    return row


def _logits(model: Any, cache: CompressedCache, row: Row) -> torch.Tensor:
    """Log-probabilities [T, V] along the question and the full cache's answer."""
    ids = torch.tensor([row["then"] + row["answer"][:-1]])
    return continuation(model, ids, cache)[0].log_softmax(-1)


def _score(tokenizer: Any, prompt: Any, generated: list[int]) -> float:
    return 100 * float(prompt.sample.score(tokenizer.decode(generated, skip_special_tokens=True)))


def _add(side: Side, kl: float, score: float, size: float) -> None:
    side.kl.append(kl)
    side.score.append(score)
    side.size.append(size)


if __name__ == "__main__":
    main()
