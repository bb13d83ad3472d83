"""A made-up comparison with everything that `report.html` shows."""

from typing import Any

import numpy as np

from learnkv.evaluation.html.page import Contents
from learnkv.evaluation.kept_entries import VIEW, packed
from learnkv.evaluation.results import rows_of

LAYERS, HEADS, TOKENS = 4, 2, 60
POLICIES = {"learned-tiny": 20, "snapkv": 30, "adakv@4": 40}
"""Points that each loses."""
HOSTILE = "</script><img src=x onerror=document.title='hacked'>"
NEEDLES = "needle_grid_single"
Records = list[dict[str, Any]]


def kept_of(policy: str, keep: float) -> np.ndarray:
    """[L, H, tokens]: head 0 of layer 0 keeps the first tokens, all others the last ones; a policy shifts them."""
    count, shift = round(keep * TOKENS), list(POLICIES).index(policy)
    kept = np.zeros((LAYERS, HEADS, TOKENS), dtype=bool)
    kept[..., TOKENS - count - shift : TOKENS - shift] = True
    kept[0, 0] = False
    kept[0, 0, :count] = True
    return kept


def view_of(policy: str, keep: float, index: int) -> dict[str, Any]:
    if policy == "full":
        words = [f" word{number}" for number in range(TOKENS - 3)]
        return {"tokens": ["Sample", f" {index}", "\n", *words], "after": f"\nWhat is {HOSTILE}?"}
    bits = [[4.5] * HEADS] * LAYERS if "@" in policy else None
    return {"shape": [LAYERS, HEADS, TOKENS], "kept": packed(kept_of(policy, keep)), "bits": bits}


def record(policy: str, keep: float, task: str, index: int, **more: Any) -> dict[str, Any]:
    lost = POLICIES.get(policy, 0) * (2 if keep < 0.3 else 1)
    record = {
        **{"policy": policy, "metric": "generated", "task": task, "length": 1024, "setting": "query_agnostic"},
        **{"index": index, "keep": keep, "budget": None, "bytes_budget": None, "asked": keep, "asked_bytes": None},
        **{"spent": keep, "read": keep, "bytes": 2_000_000 * keep, "bytes_full": 2_000_000.0, "haystack": None},
        **{"precision": "4" if "@" in policy else None, "depth": None, "expected": ["4817293"], "cut_tokens": 0},
        **{"score": 90.0 - lost + 5 * (index % 3), "answer": f"{policy} answers 4817293"},
        **more,
    }
    if index < 2 and task in ("vt", "text"):
        record[VIEW] = view_of(policy, keep, index)
    return record


def records_of(**more: Any) -> Records:
    made: Records = []
    for policy, keep in [("full", 1.0), *((name, keep) for name in POLICIES for keep in (0.5, 0.1))]:
        made += [record(policy, keep, task, index, **more) for task in ("niah_single_1", "vt") for index in range(4)]
        aware = {"setting": "query_aware", **more}
        made += [record(policy, keep, "vt", index, **aware) for index in range(4)]
        kl = 0.0 if policy == "full" else 0.02 * POLICIES[policy] / keep
        for index in range(3):
            text = {"metric": "forced", "kl": kl * (1 + index / 10), "loss": 2.0 + kl, "expected": None, "answer": None}
            made.append(record(policy, keep, "text", index, **text, **more))
        for number, (depth, length) in enumerate((d, n) for d in (0, 50, 100) for n in (512, 1024)):
            place = {"depth": depth, "length": length, "score": 100.0 * (number % 2), **more}
            made.append(record(policy, keep, NEEDLES, number, **place))
    return made


def contents(**more: Any) -> Contents:
    records = records_of()
    about = {
        "title": "Compressed caches of tiny",
        "model": "tiny",
        "environment": {"python": "3.11", "torch": "2.13", "device": "cpu"},
        "records": records,
        "rows": rows_of(records),
        "notes": [f"a note with {HOSTILE}"],
        "command": "learnkv eval ckpt=snapkv",
        "config": "ckpt: [snapkv]\n",
    }
    return Contents(**(about | more))
