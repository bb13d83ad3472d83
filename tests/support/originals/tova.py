"""TOVA: one ranking for all heads of a layer, and one eviction per token while decoding."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, inputs_of, observation, policy


def check_tova(case: Case) -> None:
    params = case.params
    tova, inputs = policy("tova"), inputs_of(case)

    def score(query: int, positions: Tensor) -> Tensor:
        """Scores [B, H, S] of a cache that holds the entries at `positions` [B, S] when the token `query` is new."""
        at = positions[:, None, :, None].expand(-1, inputs["k"].shape[1], -1, inputs["k"].shape[3])
        cache = (inputs[name].gather(2, at) for name in ("k", "v"))
        new = torch.full((len(positions), 1), query)
        held = {"query_positions": new, "positions": at[..., 0]}
        return tova.scorer(observation(inputs["q"][:, :, query : query + 1], *cache, **held))

    def evict(scores: Tensor, want: np.ndarray[Any, Any]) -> Tensor:
        """What is kept of a cache, [B, H, S] all heads alike, checked against the places `want` [B, C] in it."""
        mask = kept(scores, budgets(tova, scores, min(params["cache_size"], scores.shape[-1]))[0])
        assert (mask == mask[:, :1]).all()
        assert_kept(mask[:, 0], scores[:, 0].numpy(), want)
        return torch.from_numpy(mask[:, 0])

    read = torch.arange(params["P"]).expand(len(inputs["k"]), -1)
    scores = score(params["P"] - 1, read)
    assert_scores(scores[:, 0].numpy(), case["scores"])
    golden = torch.from_numpy(case["kept"]).long()
    evict(scores, golden.numpy())
    for step, theirs in enumerate(case["kept_steps"]):
        new = params["P"] + step
        held = torch.cat([golden, torch.full((len(golden), 1), new)], 1)
        golden = torch.from_numpy(theirs).long()
        evict(score(new, held), torch.searchsorted(held, golden).numpy())


FAMILIES = {"tova": check_tova}
