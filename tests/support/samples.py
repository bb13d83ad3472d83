"""Made-up samples of comparisons."""

from typing import Any


def record(
    policy: str, task: str, index: int, score: float, keep: float = 0.1, setting: str = "query_agnostic", **more: Any
) -> dict[str, Any]:
    """One sample, as a comparison stores it."""
    about = {
        "policy": policy,
        "metric": "generated",
        "task": task,
        "length": 1024,
        "setting": setting,
        "index": index,
        "keep": keep,
    }
    size = {"budget": None, "asked": keep, "spent": keep, "bytes": 1000 * keep, "bytes_full": 1000.0, "haystack": None}
    mark = f"{policy}/{task}/{setting}/{keep}/{index}"
    return {**about, **size, "score": score, "fingerprint": mark, **more}
