"""HeteroCache's kinds of heads, in the authors' JSON: kinds, weights and satellites of every kv head."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, table, write_text
from learnkv.ops.head_taxonomy import PIVOT, SATELLITE, Taxonomy

KINDS, WEIGHTS, RELATIONS = "classification_matrix", "allocation_matrix", "leader_member_relations"


def read(path: str | Path) -> Taxonomy:
    """The kinds of heads in a file.

    Raises:
        UserError: no such file, another format, satellites without a pivot.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {KINDS, WEIGHTS, RELATIONS} <= content.keys():
        raise UserError(f"{path}: expected the keys {KINDS}, {WEIGHTS} and {RELATIONS}")
    kinds, weights = (table(path, content[key], key) for key in (KINDS, WEIGHTS))
    if kinds.shape != weights.shape or len(content[RELATIONS]) != len(kinds):
        raise UserError(f"{path}: expected {KINDS}, {WEIGHTS} and {RELATIONS} of the same layers and heads")
    kinds = kinds.long()
    pivots = torch.full_like(kinds, -1)
    for layer_idx, relations in enumerate(content[RELATIONS]):
        for pivot, satellites in _relations(path, relations, kinds[layer_idx]).items():
            pivots[layer_idx, satellites] = pivot
    if bool(((kinds < 1) | (kinds > SATELLITE)).any()) or not torch.equal(pivots >= 0, kinds == SATELLITE):
        raise UserError(f"{path}: expected kinds 1 to 4, and every satellite (4) with the pivot (3) that it follows")
    order = [[int(pivot) for pivot in relations] for relations in content[RELATIONS]]
    return Taxonomy(kinds, weights, pivots, order)


def _relations(path: str | Path, relations: Any, kinds: Tensor) -> dict[int, list[int]]:
    """Satellites by pivot of one layer, checked."""
    try:
        satellites = {int(pivot): [int(head) for head in heads] for pivot, heads in relations.items()}
        whole = all(
            int(kinds[pivot]) == PIVOT and all(0 <= h < len(kinds) for h in own) for pivot, own in satellites.items()
        )
    except (AttributeError, TypeError, ValueError, IndexError):
        whole = False
    if not whole:
        raise UserError(f"{path}: expected {RELATIONS} of pivots and lists of heads")
    return satellites


def write(path: str | Path, heads: Taxonomy) -> Path:
    """Write the kinds of heads."""
    relations = [
        {str(pivot): (heads.pivots[layer] == pivot).nonzero().flatten().tolist() for pivot in order}
        for layer, order in enumerate(heads.order)
    ]
    content = {KINDS: heads.kinds.tolist(), WEIGHTS: heads.weights.tolist(), RELATIONS: relations}
    return write_text(path, json.dumps(content) + "\n")
