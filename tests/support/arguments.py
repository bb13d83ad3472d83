"""Arguments of attention ops by the names of their tensors, so that a test can change or differentiate each of them."""

from collections.abc import Callable, Mapping
from typing import Any

from learnkv.ops.arguments import Pages, Ragged, Tail


def grouped(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an op: `kept_…`, `tail_…` and `page…` make a `Ragged`, a `Tail` and `Pages`."""
    rest = dict(given)
    if "offset" in rest:
        tables = [rest.pop(name) for name in ("kept_keys", "kept_values", "offset", "length", "longest")]
        rest["kept"] = Ragged(*tables)
    tail = [rest.pop(f"tail_{name}", None) for name in ("keys", "values", "mask", "used")]
    rest["tail"] = Tail(*tail)
    if "pages" in rest:
        rest["pages"] = Pages(rest["pages"], rest.pop("page_size"))
    return rest


def call(op: Callable[..., Any], given: Mapping[str, Any], **options: Any) -> Any:
    """The result of an op for arguments by the names of their tensors."""
    return op(**grouped(given), **options)
