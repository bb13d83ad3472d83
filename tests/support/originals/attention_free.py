"""Methods that look at positions or keys only: StreamingLLM and the key norm."""

import torch
from torch import Tensor

from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, observation, policy, scored


def check_streaming_llm(case: Case) -> None:
    params = case.params
    capacity = params["capacity"]
    sinks = capacity - params["window"] if "window" in params else params.get("sinks", 4)
    streaming = policy("streaming_llm", scorer={"sinks": sinks})

    def trim(positions: Tensor, room: int) -> Tensor:
        """What stays of a cache that holds `positions` [S] when it may hold `room` entries."""
        blank = torch.zeros(1, 1, len(positions), 1)
        scores = streaming.scorer(observation(blank[:, :, :0], blank, blank, positions=positions.view(1, 1, -1)))
        return positions[kept(scores, budgets(streaming, scores, room)[0])[0, 0]]

    cache = torch.arange(params["T"])
    if params.get("mode") != "decode":
        assert trim(cache, capacity).tolist() == case["kept"].tolist()
        return
    coming = params.get("num_coming", 1)
    for row in case["kept_steps"]:
        cache = trim(cache, capacity - coming)
        cache = torch.cat([cache, cache[-1] + 1 + torch.arange(coming)])
        assert cache.tolist() == row[row >= 0].tolist()


def check_knorm(case: Case) -> None:
    knorm = policy("knorm")
    scores = scored(case, knorm)
    golden = -case["norms"]
    assert_scores(scores.numpy(), golden)
    skipped = case.params["layer_idx"] in case.params["skip_layers"]
    budget = budgets(knorm, scores, scores.shape[-1] if skipped else case.params["capacity"])[0]
    assert_kept(kept(scores, budget), golden, case["kept"])


FAMILIES = {"streamingllm": check_streaming_llm, "l2norm": check_knorm}
