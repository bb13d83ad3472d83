"""Lossless decoding on SmolLM2: `python -m benchmarks.lossless [--out FILE.json]`.

Accepted tokens per round and seconds per token, beside plain decoding with the full cache, which generates the same
tokens. One thread. Seconds are those of the wall and, as other programs share the machine, those of the processor.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from learnkv import CompressedCache, Policy, generate, generate_lossless, load_model, load_policy, prefill
from learnkv.data.haystack import essay
from learnkv.inference.prompt_format import format_prompt

POLICIES = ("smollm2", "kvzip", "snapkv", "streaming_llm", "random")
KEEPS = (0.25, 0.1, 0.05)
QUESTION = "What is explained in this text? Answer in three sentences."
FULL = "full cache"


def prompts(tokenizer: Any, count: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of `length` tokens of CPython's documentation as a user's message, and the end of that message."""
    head, tail, _ = format_prompt(tokenizer, "", "\n\n" + QUESTION)
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (head, tail))
    text = tokenizer(" ".join(essay())[: 40 * count * length], add_special_tokens=False, verbose=False).input_ids
    window = length - len(before)
    for begin in range(0, count * window, window):
        yield torch.tensor([before + text[begin : begin + window]]), torch.tensor([after])


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, and seconds of the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(model: Any, tokenizer: Any, policies: Mapping[str, Policy], given: argparse.Namespace) -> list[Any]:
    """A record per prompt, policy and budget, and one of the full cache per prompt."""
    settings: dict[str, Any] = {"max_new_tokens": given.new, "eos_token_id": []}
    records: list[Any] = []
    for index, (ids, question) in enumerate(prompts(tokenizer, given.prompts, given.length)):
        full = prefill(model, ids, policies=policies.values())

        def plain(full: CompressedCache = full, question: Tensor = question) -> Tensor:
            return generate(model, question, full.fork(), **settings)

        plain()  # warm
        expected, *seconds = timed(plain)
        records.append(record(index, FULL, 1.0, seconds, given.new))
        for name, policy in policies.items():
            for keep in given.keeps:
                draft, cache = policy.compress(full.fork(), keep=keep), full.fork()

                def lossless(cache: CompressedCache = cache, draft: CompressedCache = draft) -> Any:
                    return generate_lossless(model, question, cache, draft, draft_tokens=given.draft, **settings)  # noqa: B023

                output, *seconds = timed(lossless)
                same = int((output.tokens == expected).all())
                accepted = [count for rows in output.accepted for count in rows]
                drafted = {"accepted": accepted, "drafted": output.drafted, "same_tokens": same}
                records.append({**record(index, name, keep, seconds, given.new), **drafted})
                print(json.dumps(records[-1]), flush=True)
    return records


def record(prompt: int, policy: str, keep: float, seconds: Sequence[float], tokens: int) -> dict[str, Any]:
    """The columns that plain and lossless decoding share."""
    wall, cpu = (round(1000 * part / tokens, 1) for part in seconds)
    return {"prompt": prompt, "policy": policy, "keep": keep, "wall_ms": wall, "cpu_ms": cpu}


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table: accepted tokens per round, milliseconds per token over those of plain decoding."""
    records = result["records"]
    plain = {record["prompt"]: record for record in records if record["policy"] == FULL}
    lines = ["| policy | kept | accepted per round | time per token, of plain decoding's | processor's | same tokens |"]
    lines.append("| --- |" + " ---: |" * 5)
    for name, keep in dict.fromkeys((r["policy"], r["keep"]) for r in records if r["policy"] != FULL):
        rows = [r for r in records if (r["policy"], r["keep"]) == (name, keep)]
        accepted = fmean(count for row in rows for count in row["accepted"])
        wall, cpu = (fmean(row[key] / plain[row["prompt"]][key] for row in rows) for key in ("wall_ms", "cpu_ms"))
        same = f"{sum(row['same_tokens'] for row in rows)} of {len(rows)}"
        lines.append(
            f"| {name} | {keep:g} | {accepted:.2f} of {result['draft']} | {wall:.2f} x | {cpu:.2f} x | {same} |"
        )
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--keeps", nargs="+", type=float, default=list(KEEPS))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=33)
    parser.add_argument("--draft", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    model, tokenizer = load_model(given.model, dtype="float32", device="cpu")
    records = measure(model, tokenizer, {name: load_policy(name, model=model) for name in given.policies}, given)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    result = {**settings, "torch": torch.__version__, "records": records}
    full = [record for record in records if record["policy"] == FULL]
    print(f"plain decoding: {fmean(r['wall_ms'] for r in full):.0f} ms per token, of the processor", end=" ")
    print(f"{fmean(r['cpu_ms'] for r in full):.0f} ms")
    print("\n".join(table(result)))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
