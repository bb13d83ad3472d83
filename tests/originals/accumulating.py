"""Methods that add up the attention of all queries: H2O."""

import numpy as np

from originals.comparing import assert_kept, assert_scores, budgets, kept
from originals.loading import Case, inputs_of, observation, policy


def check_h2o(case: Case, causal: bool = True) -> None:
    params = case.params
    arguments = {"group_reduce": params.get("group_agg") or "sum", "causal": causal, "window": params["window"]}
    h2o = policy("h2o", scorer=arguments)
    inputs = inputs_of(case)
    seen = observation(inputs["q"], inputs["k"], inputs["v"])
    statistics = {one: one.update(seen, None) for one in h2o.scorer.statistics}
    scores = h2o.scorer(observation(inputs["q"], inputs["k"], inputs["v"], statistics=statistics))
    past = scores.shape[-1] - params["window"]
    golden: np.ndarray = case["scores"]
    assert_scores(scores[..., :past].numpy(), golden)
    scores[..., past:] = np.inf
    assert_kept(kept(scores, budgets(h2o, scores, params["capacity"])[0]), golden, case["kept"])


FAMILIES = {"h2o": check_h2o, "h2o_legacy_acausal": lambda case: check_h2o(case, causal=False)}
