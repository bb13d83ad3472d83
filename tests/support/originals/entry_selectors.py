"""What decode steps read of a whole cache: DELTA's pages and Louver's thresholds."""

from typing import Any

import numpy as np
import torch

from learnkv.core.entry_selector import Lookup
from support.originals.comparing import assert_best, assert_scores
from support.originals.loading import Case, policy


def check_delta(case: Case) -> None:
    params = case.params
    size, count, lengths = params["page_size"], params["k"], params["lengths"]
    arguments = {"page_size": size, "recent_pages": params["recent_pages"], "dense_layers": 0, "full_layers": [0]}
    logits, golden = torch.from_numpy(case["logits"]), case["page_scores"]
    assert_scores(logits.logsumexp(-1).numpy(), case["lse"], rtol=1e-5)
    entries = torch.tensor(lengths).unsqueeze(-1)
    for name, tie_break in (("pages_v1", 0.0), ("pages_v2", 1e-7)):
        if name not in case:
            continue
        selector = policy("delta", pages=arguments | {"tie_break": tie_break}).pages
        shared: dict[str, torch.Tensor] = {}
        nothing = torch.zeros(len(lengths), logits.shape[1], logits.shape[2], 0)
        tokens = torch.full((len(lengths),), count * size)
        parts = (nothing[:, :, 0], nothing, logits.unsqueeze(2), entries.expand(-1, logits.shape[1]))
        chosen, _ = selector(Lookup(*parts, entries, tokens, 0, 1.0, shared), {})
        assert chosen is None, "a full layer reads everything"
        chosen, _ = selector(Lookup(*parts, entries, tokens, 1, 1.0, shared), {})
        assert bool((chosen == chosen[:, :1]).all())
        scores = selector.scores(logits.softmax(-1)).numpy()
        assert_scores(scores, golden)
        for mine, score, theirs, length in zip(chosen[:, 0].numpy(), golden, case[name], lengths, strict=True):
            pages = -(-length // size)
            recent = min(params["recent_pages"], count, pages)
            listed = theirs[theirs >= 0]
            assert np.count_nonzero(mine) == len(listed) == min(count, pages)
            assert mine[pages - recent : pages].all()
            assert not mine[pages:].any()
            assert_best(mine[: pages - recent], score[: pages - recent], np.count_nonzero(listed < pages - recent))


def check_louver(case: Case) -> None:
    """The case's sample by itself, then as the keys of a cache whose every key is sampled."""
    params = case.params
    query, sample, keys = (torch.from_numpy(case[name]) for name in ("q", "sample", "keys"))
    sample, heads = sample[:, : params["filled"]], len(sample)
    arguments = {"mode": "budget" if params["mode"] == "budget" else params["oracle"], "buffer": 1}
    arguments |= {"fraction": params["budget_fraction"], "search": params["gap_search_frac"]}
    louver = policy("louver", pages=arguments | {"gaps": params["gap_topk"], "sample": params["filled"]}).pages
    grouped = query.view(heads, -1, query.shape[-1])
    count = torch.full((1, 1, 1), params["filled"])
    share = torch.full((1, 1, 1), params["budget_fraction"], dtype=torch.float64)
    tau, golden = louver.threshold(grouped @ sample.mT, count, share), case["tau"]
    assert_scores(tau.flatten().numpy(), golden)

    wanted, products = case["selected"].astype(bool), (grouped @ keys.mT).flatten(0, 1).numpy()
    clear = np.abs(products - golden[:, None]) > 1e-4 * np.abs(golden[:, None])
    assert np.array_equal((products >= tau.flatten().numpy()[:, None])[clear], wanted[clear])

    stored = torch.cat([sample, torch.zeros_like(sample[:, :1])], 1).unsqueeze(0)  # and the token itself
    logits = torch.einsum("hgd,hed->hge", grouped, stored[0]).unsqueeze(0)
    entries = torch.full((1, heads), stored.shape[2])
    parts: tuple[Any, ...] = (query.unsqueeze(0), stored, logits, entries, entries - 1, torch.tensor([1]), 0, 1.0, {})
    read, _ = louver(Lookup(*parts), {})
    margin = 1e-4 * np.abs(golden[:, None])
    passing = logits[0, ..., :-1].flatten(0, 1).numpy()
    clear = np.abs(passing - golden[:, None]) > margin
    assert np.array_equal(read[0, ..., :-1].flatten(0, 1).numpy()[clear], (passing >= golden[:, None])[clear])
    assert read[..., -1].all()


FAMILIES = {"delta": check_delta, "louver_threshold": check_louver}
