"""Budgets from files: HeadKV's head scores, LU-KV's curves, DuoAttention's gates, CompressKV's layer errors."""

import filecmp
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learnkv.formats import duo, headkv, layers, lukv
from learnkv.policy.policy import Policy
from support.originals.comparing import assert_best, assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, policy, scored, sidecar_of
from support.originals.snapkv import past_and_protected, snapkv_arguments


def check_headkv_scores(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert filecmp.cmp(headkv.write(Path(folder) / "scores.json", headkv.read(path)), path, shallow=False)


def headkv_with(case: Case, table: str, **scorer: object) -> Policy:
    """HeadKV with this case's parameters and the score file `table` beside it."""
    params = case.params
    allocator = {"scores": str(case.path.with_name(table)), "beta": params["beta"], "rounding": "original"}
    return policy("headkv", scorer=scorer, allocator=allocator | {"temperature": params.get("temp", 1)})


def protecting(shape: tuple[int, ...], window: int) -> Tensor:
    """Scores of which the last `window` are protected."""
    scores = torch.zeros(shape)
    scores[..., shape[-1] - window :] = torch.inf
    return scores


def check_headkv_budgets(case: Case) -> None:
    params, capacity = case.params, case["head_capacity"]
    policy = headkv_with(case, case.path.name.replace("budgets", "scores") + ".json")
    window = params["window"]
    budget = params["capacity"] + (window if params["impl"] == "KVCache-Factory" else 0)
    scores = protecting((len(capacity), 1, capacity.shape[1], window + 1), window)
    wanted = policy.allocator(scores, None, torch.tensor([budget], dtype=torch.float64))[:, 0] - window
    assert wanted.tolist() == capacity.tolist()
    if "weights" in case:
        np.testing.assert_allclose(policy.allocator.importance.numpy(), case["weights"], rtol=1e-6)


def check_headkv_select(case: Case) -> None:
    params = case.params
    table = sidecar_of(case.path)["score_file"]
    count = len(headkv.read(case.path.with_name(table)))
    policy = headkv_with(case, table, **snapkv_arguments(params, "mean"))
    golden, scores = past_and_protected(case, policy)
    budget = budgets(policy, scores, params["capacity"], count)[params["layer_idx"]]
    assert (budget - params["window"]).flatten().tolist() == case["head_budgets"].flatten().tolist()
    assert_kept(kept(scores, budget)[0], golden[0], case["kept"])
    row, window = case["head_capacity"], params["window"]
    scores = protecting((count, 1, len(row), window + 1), window)
    every = policy.allocator(scores, None, torch.tensor([params["capacity"]]))
    assert (every[params["layer_idx"], 0] - window).tolist() == row.tolist()


def check_lukv_curve(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert filecmp.cmp(lukv.write(Path(folder) / "curve.npy", lukv.read(path)), path, shallow=False)


def check_lukv(case: Case) -> None:
    params = case.params
    curve = case.path.with_name(sidecar_of(case.path)["table_file"])
    assert np.array_equal(lukv.read(curve).numpy(), case.shared["curve"])
    policy_ = policy("lukv", allocator={"curve": str(curve), "rounding": "original"})
    entries, counts = params["T"], case["keep_counts"]
    budget = torch.tensor([entries * (1 - params["compression_ratio"])], dtype=torch.float64)
    wanted = policy_.allocator(torch.zeros(len(counts), 1, counts.shape[1], entries), None, budget)[:, 0]
    assert wanted.tolist() == counts.tolist()
    if "token_scores" in case:
        scores = torch.from_numpy(case["token_scores"]).clone()
        scores[..., : params["sink"]] = torch.inf
        scores[..., entries - params["window"] :] = torch.inf
        mask, golden = kept(scores, wanted.long()), case["kept_mask"]
        rows = (one.reshape(-1, entries) for one in (mask, golden, scores.numpy()))
        for mine, theirs, score in zip(*rows, strict=True):
            assert_best(mine, np.minimum(score, 1e30), np.count_nonzero(theirs))
            protected = np.isinf(score)
            assert np.array_equal(mine[protected], theirs[protected].astype(bool))


def check_duo_pattern(path: Path) -> None:
    pattern = duo.read(path.parent)
    with tempfile.TemporaryDirectory() as folder:
        duo.write(folder, pattern.gates, pattern.sink, pattern.recent, pattern.config)
        assert filecmp.cmp(Path(folder) / path.name, path, shallow=False)


def check_duo(case: Case) -> None:
    params = case.params
    folder = case.path.with_name(sidecar_of(case.path)["table_dir"])
    arguments = {"gates": str(folder), "sparsity": params["sparsity"], "sink": params["sink"]}
    arguments |= {"recent": params["recent"]}
    heads = case.shared["heads"]
    original = policy("duo_attention", allocator=arguments | {"counting": "original"}).allocator
    np.testing.assert_allclose(original.gates.numpy(), heads, rtol=1e-6)
    full, must_keep, must_stream = (
        case[name].astype(bool) for name in ("full_mask_official", "must_keep", "must_stream")
    )
    mine = ~original.streaming().numpy()
    assert_best(mine.ravel(), heads.ravel().astype(np.float64), np.count_nonzero(full))
    assert mine[must_keep].all()
    assert not mine[must_stream].any()

    kvpress = policy("duo_attention", allocator=arguments | {"counting": "kvpress"}).allocator
    theirs = case["streaming_mask_kvpress"].astype(bool)
    streams = kvpress.streaming().numpy()
    assert_best(streams.ravel(), -heads.ravel().astype(np.float64), np.count_nonzero(theirs))
    wanted = kvpress(torch.zeros(*heads.shape[:1], 1, heads.shape[1], params["T"]), None, torch.ones(1))[:, 0].numpy()
    lengths = case["kept_len"]
    assert np.array_equal(wanted[streams == theirs], lengths[streams == theirs])
    assert wanted.sum() == lengths.sum()


def check_compresskv(case: Case) -> None:
    """One layer, whose heads are ranked as the case says; every kv head keeps the same."""
    params, ranking = case.params, case.params["important_heads"]
    with tempfile.TemporaryDirectory() as folder:
        file = headkv.write(
            Path(folder) / "heads.json", [[[-float(ranking.index(head))] for head in range(len(ranking))]]
        )
        scorer = {"heads": str(file), "first": params["first_k"], "window": params["window"]}
        scorer |= {"kernel_size": params["kernel"], "pooling": params["pooling"].removesuffix("pool")}
        compresskv = policy("compresskv", scorer=scorer)
    scores = scored(case, compresskv).clone()
    past = scores.shape[-1] - params["window"]
    golden = case["scores"]
    assert_scores(scores[:, 0, :past].numpy(), golden)
    scores[..., past:] = torch.inf
    mask = kept(scores, torch.full(scores.shape[:2], params["capacity"]))
    assert (mask == mask[:, :1]).all()
    assert_kept(mask[:, 0], golden, case["kept"])


def check_layer_errors(case: Case) -> None:
    params = case.params
    with tempfile.TemporaryDirectory() as folder:
        file = layers.write(Path(folder) / "errors.json", case["layer_score"].astype(np.float64).tolist())
        arguments = {"errors": str(file), "minimum": params["min_tokens"], "rounding": "original"}
        arguments |= {"most": params["max_tokens"] / params["capacity"]}
        allocator = policy("compresskv", allocator=arguments).allocator
    scores = torch.zeros(params["L"], 1, 2, params["max_tokens"])
    wanted = allocator(scores, None, torch.tensor([params["capacity"]], dtype=torch.float64))
    assert torch.equal(wanted[..., 0], wanted[..., 1])
    assert wanted[:, 0, 0].tolist() == case["budgets"].tolist()


FAMILIES = {
    "headkv_budgets": check_headkv_budgets,
    "headkv_select": check_headkv_select,
    "lukv": check_lukv,
    "duo": check_duo,
    "compresskv": check_compresskv,
    "compresskv_layer_budgets": check_layer_errors,
}
FILES = {
    "headkv_scores": check_headkv_scores,
    "lukv_curve": check_lukv_curve,
    "duo_pattern": check_duo_pattern,
}
