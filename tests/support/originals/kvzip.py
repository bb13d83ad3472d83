"""KVzip by its authors and in kvpress, KVzip+, and the regression target of KVzap."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnkv.core.observation import Observation, PassTokens
from learnkv.ops.output_projection import projected_l2
from learnkv.policy.policy import Policy
from support.originals.comparing import assert_best, assert_scores, kept
from support.originals.loading import Case, inputs_of, observation, policy, projection


def pass_over(
    inputs: dict[str, Any], case: Case, scale: float, chunk: list[int], prompt: int, repeats: slice
) -> tuple[Observation, PassTokens]:
    """The observation of a pass: the rows [chunk[2], chunk[3]) of the inputs, after the first `prompt` rows,
    repeat [chunk[0], chunk[1])."""
    begin, end, first, last = chunk
    keys, values = (torch.cat([inputs[name][:, :, :prompt], inputs[name][:, :, first:last]], 2) for name in ("k", "v"))
    hidden = inputs["q_pre"][:, :, first:last].transpose(1, 2).flatten(2)
    fields = {"project": projection(case), "hidden": hidden}
    obs = observation(scale * inputs["q"][:, :, first:last], keys, values, **fields)
    mask = torch.ones(1, last - first, dtype=torch.bool)
    rows = torch.zeros_like(mask)
    rows[:, repeats] = True
    return obs, PassTokens(mask.long(), mask, rows, torch.tensor([begin]), torch.tensor([end]))


def scores_of(case: Case, kvzip: Policy, chunks: list[list[int]], prompt: int, repeats: slice = slice(None)) -> Tensor:
    """Scores [L, H, prompt] after all passes, every layer with its own scale of the queries."""
    inputs, layers = inputs_of(case), []
    (prompt_pass,) = kvzip.scorer.extra_passes
    for scale in case.params.get("layer_scale", [1.0]):
        values = None
        for chunk in chunks:
            values = prompt_pass.update(*pass_over(inputs, case, scale, chunk, prompt, repeats), values)
        obs = observation(
            inputs["q"][:, :, :0], *(inputs[n][:, :, :prompt] for n in ("k", "v")), statistics={prompt_pass: values}
        )
        layers.append(kvzip.scorer(obs)[0])
    return torch.stack(layers)


def highest(kvzip: Policy, scores: Tensor, places: int) -> tuple[np.ndarray, Tensor]:
    """What is kept [L, H, S] with so many places in all, and the entries per head [L, H]."""
    stacked = scores.unsqueeze(1)
    per_head = places / (scores.shape[0] * scores.shape[1])
    budget = kvzip.allocator(stacked, None, torch.tensor([per_head], dtype=torch.float64)).long()[:, 0]
    return kept(scores, budget), budget


def check_kvzip(case: Case) -> None:
    params = case.params
    if params.get("level") == "head":
        check_head_level(case)
        return
    kvzip = policy("kvzip", scorer={"prefix": params["sink"], "sinks": params["sink"]}, allocator={"rounding": "kvzip"})
    chunks = params["chunks"]
    end = max(chunk[1] for chunk in chunks)
    scores = scores_of(case, kvzip, chunks, end)[..., params["sink"] :]
    golden = case.of(params["scores_case"])["scores"] if params["scores_case"] else case["scores"]
    assert_scores(scores.numpy(), golden)
    places = int(params["N"] * params["ratio"])
    ordered = scores.flatten().sort(descending=True).values
    assert_scores(ordered[max(places - 1, 0)].view(1).numpy(), case["threshold"])
    mask, lengths = highest(kvzip, scores, max(places, 1))
    valid = case["valid"].astype(bool)
    assert lengths.tolist() == case["head_lens"].tolist()
    assert_best(valid.ravel(), golden.astype(np.float64).ravel(), valid.sum())
    assert_best(mask.ravel(), golden.astype(np.float64).ravel(), valid.sum())
    uniform = case["kept_uniform"].astype(bool)
    each = int(scores.shape[-1] * params["ratio"])
    mine = kept(scores, torch.full(scores.shape[:2], each))
    for one, theirs, score in zip(
        mine.reshape(-1, mine.shape[-1]),
        uniform.reshape(-1, mine.shape[-1]),
        golden.reshape(-1, mine.shape[-1]),
        strict=True,
    ):
        assert theirs.sum() == each
        assert_best(one, score.astype(np.float64), each)


def check_head_level(case: Case) -> None:
    """Ties between heads are intended: heads whose values lies strictly above the threshold keep everything."""
    params, table = case.params, case.shared["head_table"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "heads.json"
        file.write_text(json.dumps({"shape": list(table.shape), "score": table.tolist()}))
        kvzip = policy("kvzip", scorer={"heads": str(file)}, allocator={"rounding": "kvzip"})
    blank = torch.zeros(1, table.shape[1], params["ctx"], 1)
    layers = [observation(blank[:, :, :0], blank, blank, layer_idx=layer) for layer in range(len(table))]
    scores = torch.stack([kvzip.scorer(one)[0] for one in layers])
    places = int(scores.numel() * params["ratio"])
    assert_scores(scores.flatten().sort(descending=True).values[max(places - 1, 0)].view(1).numpy(), case["threshold"])
    _, lengths = highest(kvzip, scores, max(places, 1))
    assert lengths.tolist() == (params["ctx"] * case["head_keep"].astype(int)).tolist()


def check_kvpress(case: Case, first: str) -> None:
    params, chunks = case.params, case.params["chunks"]
    arguments = {
        "prefix": params["prefix"],
        "sinks": params["n_sink"],
        "normalized": params["kvzip_plus"],
        "first": first,
    }
    kvzip = policy("kvzip", scorer=arguments)
    end = max(chunk[1] for chunk in chunks)
    scores = scores_of(case, kvzip, chunks, end)
    golden = case.of(params["scores_case"])["scores"] if params["scores_case"] else case["scores"]
    ours, theirs, protected = scores.numpy().copy(), golden.copy(), params["n_sink"]
    if first == "sinks" and protected:  # theirs is one more than the largest score of all layers
        assert ours[..., :protected].min() > ours[..., protected:].max()
        assert theirs[..., :protected].min() > theirs[..., protected:].max()
        ours, theirs = ours[..., protected:], theirs[..., protected:]
    assert_scores(ours, theirs)
    if "h_norm" in case:
        inputs, weight = inputs_of(case), torch.from_numpy(case.shared["Wo"])
        rows = torch.cat([inputs["q_pre"][0, :, a:b] for *_, a, b in chunks], 1)
        assert_scores(rows.transpose(0, 1).flatten(1).norm(dim=-1).numpy(), case["h_norm"])
        norms = projected_l2(inputs["v"][:, :, :end], weight)[0].flatten(0, 1)
        assert_scores(norms.numpy(), case["wov_norm_ctx"])
    groups = [scores[layer : layer + 1] for layer in range(len(scores))] if params["layerwise"] else [scores]
    masks = [highest(kvzip, one, one.numel() - int(one.numel() * params["compression_ratio"]))[0] for one in groups]
    mask, mine = case["kept_mask"].astype(bool), np.concatenate(masks)
    pruned = case["n_pruned_layers"]
    assert (mine.shape[1] * mine.shape[2] - mine.sum((1, 2))).tolist() == pruned.tolist()
    assert (~mask).sum((1, 2)).tolist() == pruned.tolist()
    for one, score in zip(mine, golden.astype(np.float64), strict=True):
        assert_best(one.ravel(), score.ravel(), one.sum())


def check_kvzap(case: Case) -> None:
    params = case.params
    begin, end, first, last = (params[f"{edge}_{part}"] for part in ("prompt", "repeated") for edge in ("start", "end"))
    inputs = inputs_of(case)
    arguments = {"prefix": begin, "normalized": True, "softmax": "all", "queries": "repeated", "log": True}
    kvzip = policy("kvzip", scorer=arguments)
    whole = inputs["q"].shape[2]
    scores = scores_of(case, kvzip, [[begin, end, end, whole]], end, slice(first - end, last - end))
    np.testing.assert_allclose(scores[0, :, begin:].T.numpy(), case["target"], rtol=1e-4, atol=1e-4)
    norms = inputs["q_pre"][0].transpose(0, 1).flatten(1).norm(dim=-1)
    assert_scores(norms.numpy(), case["h_norm"])


FAMILIES = {
    "kvzip": check_kvzip,
    "kvpress_kvzip": lambda case: check_kvpress(case, "one"),
    "kvpress055_kvzip": lambda case: check_kvpress(case, "sinks"),
    "kvzap_target": check_kvzap,
}
