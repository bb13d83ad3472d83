"""Methods that add up the attention of all queries: H2O, of a prompt and while tokens are added."""

import numpy as np
import torch
from transformers import LlamaConfig

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.policy.policy import Policy
from learnkv.scorers.received import ReceivedAttention
from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, inputs_of, observation, policy


def check_h2o(case: Case, causal: bool = True) -> None:
    params = case.params
    arguments = {"group_reduce": params.get("group_agg") or "sum", "causal": causal, "window": params["window"]}
    h2o = policy("h2o", scorer=arguments)
    inputs = inputs_of(case)
    obs = observation(inputs["q"], inputs["k"], inputs["v"])
    statistics = {one: one.update(obs, None) for one in h2o.scorer.statistics}
    scores = h2o.scorer(observation(inputs["q"], inputs["k"], inputs["v"], statistics=statistics))
    past = scores.shape[-1] - params["window"]
    golden: np.ndarray = case["scores"]
    assert_scores(scores[..., :past].numpy(), golden)
    scores[..., past:] = np.inf
    assert_kept(kept(scores, budgets(h2o, scores, params["capacity"])[0]), golden, case["kept"])


def check_h2o_decode(case: Case) -> None:
    """A cache of one layer reads the prompt and then a token at a time, as a model would make it do."""
    params, inputs = case.params, inputs_of(case)
    prompt, budget = params["P"], params["hh_size"] + params["recent_size"]
    scorer = policy("h2o", scorer={"group_reduce": "sum", "recent": params["recent_size"]}).scorer
    h2o = Policy(scorer, sinks=0, recent=0, evict_interval=1)
    cache = CompressedCache(LlamaConfig(num_hidden_layers=1), h2o.capture_spec)
    (layer,) = cache.compressed_layers()
    layer.capture.scaling = inputs["q"].shape[-1] ** -0.5

    def read(at: slice) -> None:
        layer.expects_attention = True
        layer.update(inputs["k"][:, :, at], inputs["v"][:, :, at])

    def assert_same(kept: np.ndarray, score: np.ndarray) -> None:
        """Kept positions [H, C], among which there are no ties, and their sums."""
        for head, (theirs, sums) in enumerate(zip(kept, score, strict=True)):
            assert cache.kept_positions(0, 0, head).tolist() == theirs.tolist()
            begin = int(layer.segment.offset[head])
            held = layer.segment.statistics[ReceivedAttention()][begin : begin + len(theirs), 0]
            assert_scores(held.numpy(), sums)

    with torch.no_grad():
        read(slice(0, prompt))
        layer.observe(inputs["q"][:, :, :prompt], None)
        h2o.compress(cache, budget=budget)
        assert_same(case["prefill_kept"], case["prefill_score"])
        for step, (kept, score) in enumerate(zip(case["kept"], case["score"], strict=True)):
            token = slice(prompt + step, prompt + step + 1)
            read(token)
            layer.attend(inputs["q"][:, :, token], None, layer.capture.scaling)
            cache.evict_if_due()
            assert cache.tail_length == 0
            assert_same(kept, score)


FAMILIES = {
    "h2o": check_h2o,
    "h2o_legacy_acausal": lambda case: check_h2o(case, causal=False),
    "h2o_decode": check_h2o_decode,
}
