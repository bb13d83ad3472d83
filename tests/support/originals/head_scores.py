"""Head scores of a single trial."""

import torch

from learnkv.ops import retrieval_heads
from support.originals.comparing import assert_scores
from support.originals.loading import Case


def check_head_scores(case: Case) -> None:
    params = case.params
    attention, prompt, said = (torch.from_numpy(case[name]) for name in ("attn", "prompt_ids", "gen_ids"))
    tokens = torch.cat([prompt, said])
    needle = (params["needle_start"], params["needle_end"])
    for output, score in (
        ("score_copy", retrieval_heads.copying),
        ("score_r2", retrieval_heads.reasoning),
        ("score_srh", retrieval_heads.semantic),
    ):
        assert_scores(score(attention, tokens, said, needle).numpy(), case[output])


FAMILIES = {"head_score_estimation": check_head_scores}
