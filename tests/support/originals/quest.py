"""Quest: bounds, page scores, pages and the attention to them."""

import numpy as np
import torch

from learnkv.cache.page_index import PageIndex
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.page_bounds import page_scores
from support.originals.comparing import assert_best, assert_scores
from support.originals.loading import Case, inputs_of, policy


def check_quest(case: Case) -> None:
    """A prompt of all tokens but the last, which is in the tail and asks; pages run through both."""
    params = case.params
    size, total = params["page_size"], params["Tc"]
    quest = policy("quest", pages={"page_size": size, "rule": params["path"], "group_reduce": "none"})
    q, k, v = (inputs_of(case)[name][:, :, :total] for name in "qkv")
    heads, dim = k.shape[1], k.shape[3]
    pools = [held[:, :, :-1].reshape(-1, dim) for held in (k, v)]
    length = torch.full((heads,), total - 1)
    positions = torch.arange(total - 1).repeat(heads)
    segment = Segment(*pools, positions, torch.arange(heads) * (total - 1), length, total - 1)
    tail = DecodeBuffer(k[:, :, -1:], v[:, :, -1:], 1)
    index = PageIndex(quest.pages, [params["token_budget"]], segment)
    query = q[:, :, -1:]
    chosen = index.choose(query, segment, tail, None)
    pages = chosen.numbers

    held = -(-total // size)
    bounds = index.bounds[:, :, :held]
    for at, output in enumerate(("page_min", "page_max")):
        if output in case:
            assert np.array_equal(bounds[:, at].numpy(), case[output])
    scores, golden = page_scores(query[:, :, 0], bounds, torch.full((heads,), held)).numpy(), case["page_scores"]
    ranked = golden.shape[1]  # the kernels do not rank the last page, which they read in any case
    assert_scores(scores[:, :ranked], golden)
    number, theirs = params.get("k_pages", params.get("page_budget")), case["pages"]
    assert theirs.shape == (q.shape[1], number)
    for mine, score, wanted in zip(pages.tolist(), golden, theirs, strict=True):
        listed = [page for page in mine if page >= 0]
        assert listed == sorted(set(listed))
        assert len(listed) == number
        assert set(listed) - set(range(ranked)) == set(wanted.tolist()) - set(range(ranked))
        assert_best(np.isin(np.arange(ranked), listed), score, np.count_nonzero(wanted < ranked))
    if "token_mask_count" in case:
        there = (pages.unsqueeze(-1) * size + torch.arange(size) < total) & (pages >= 0).unsqueeze(-1)
        assert there.sum((1, 2)).tolist() == case["token_mask_count"].tolist()
    attended, _ = decode_attention(query, segment.ragged, tail.arguments(None), dim**-0.5, chosen)
    assert_scores(attended[0, :, 0].numpy(), case["attn_out"])


FAMILIES = {"quest": check_quest}
