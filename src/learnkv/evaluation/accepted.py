"""How many drafted tokens the full cache accepts per round of lossless decoding, for every policy and budget."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.evaluation.panels import Row, budget_labels, grouped, panels, table
from learnkv.evaluation.tasks.answers import GREEDY
from learnkv.evaluation.tasks.base import Family, Prompt
from learnkv.inference.lossless import generate_lossless

TITLE = "## Lossless decoding"


def check_drafts(draft_tokens: int, families: Iterable[Family]) -> None:
    """Raise UserError where there is no answer to draft."""
    if draft_tokens and all(prompt.sample is None for family in families for prompt in family.prompts):
        raise UserError(f"draft_tokens={draft_tokens}: drafts answers, expected a task with questions")


def accepted_lengths(
    model: Any, prompts: Sequence[Prompt], cache: CompressedCache, draft: CompressedCache, draft_tokens: int
) -> list[dict[str, Any]]:
    """What lossless decoding of each prompt's answer accepts, every row by itself; nothing for a prompt without one.

    Args:
        cache, draft: the full and the compressed cache of these prompts; neither is changed.
        draft_tokens: per round; the last round of an answer may be shorter.
    """
    records: list[dict[str, Any]] = []
    for row, prompt in enumerate(prompts):
        if prompt.sample is None:
            records.append({})
            continue
        full, small = cache.fork(), draft.fork()
        for each in (full, small):
            each.batch_select_indices(torch.tensor([row]))
        ids = torch.tensor([prompt.suffix_ids], device=model.device)
        new = prompt.sample.max_new_tokens
        output = generate_lossless(model, ids, full, small, max_new_tokens=new, draft_tokens=draft_tokens, **GREEDY)
        accepted = sum(count for rows in output.accepted for count in rows)
        records.append({"draft_tokens": draft_tokens, "rounds": len(output.drafted), "accepted": accepted})
    return records


def accepted_table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a table per setting and length; none where nothing was drafted."""
    measured = [row for row in rows if row.get("accepted") is not None]
    if not measured:
        return
    yield from (TITLE, "")
    yield "Drafted tokens that the full cache accepted per round, of so many; the full cache is held beside the"
    yield "compressed one, so these are no results at fewer bytes."
    yield ""
    for panel, chosen in panels(measured).items():
        yield from (f"### {panel.title}, {panel.length:,} tokens", "")
        columns = budget_labels(chosen)
        cells = ([name, *(_cell(of.get(c, ())) for c in columns)] for name, of in grouped(chosen).items())
        yield from table(["policy", *columns], cells)


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "–"
    return f"{sum(row['accepted'] for row in rows) / len(rows):.2f} of {rows[0]['draft_tokens']}"
