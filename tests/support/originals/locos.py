"""LOCOS: contributions of a needle to the logit of an answer, and the budgets that HeadKV makes of them."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from learnkv.errors import UserError
from learnkv.formats import headkv
from learnkv.ops.logit_contribution import logit_contribution, on_and_off
from support.originals.comparing import assert_scores
from support.originals.loading import Case, policy


def check_locos(case: Case) -> None:
    params = case.params
    attention, values, projection, row = (torch.from_numpy(case[name]) for name in ("attn", "v", "Wo", "u"))
    heads = params["Hkv"]
    per_head = attention.view(heads, -1, 1, attention.shape[-1])
    needle = (params["needle_start"], params["needle_end"])
    matrix = projection.flatten(0, 1).T  # [E, H*G*D]
    added = logit_contribution(per_head, values, matrix, row.unsqueeze(0), params["logit_bias"])
    on, off = (part.flatten() for part in on_and_off(added, needle))
    assert_scores(on.numpy(), case["L_plus"])
    assert_scores(off.numpy(), case["L_minus"])
    golden = case["S"]
    assert_scores((on - off).numpy(), golden, atol=2e-6)

    positive = np.maximum(golden.astype(np.float64), 0)
    with tempfile.TemporaryDirectory() as folder:
        file = headkv.write(Path(folder) / "heads.json", [[[score] for score in (on - off).double().tolist()]])
        if not positive.any():
            with pytest.raises(UserError, match="one of them above"):
                policy("locos", allocator={"scores": str(file)})
            return
        allocator = policy("locos", allocator={"scores": str(file)}).allocator
    np.testing.assert_allclose(allocator.importance[0].numpy(), positive / positive.sum(), rtol=2e-3, atol=1e-5)


FAMILIES = {"locos": check_locos}
