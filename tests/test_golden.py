"""Our policies, built from their YAML, against numbers that the published implementations computed.

Every file of the folder `LEARNKV_GOLDEN` (default: tests/golden) is read; one of a family that is unknown here fails.
"""

import functools
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from learnkv.io import load_policy
from learnkv.observation import Observation
from learnkv.ops.select import select

HERE = Path(__file__).resolve().parent
FOLDER = Path(os.environ.get("LEARNKV_GOLDEN", HERE / "golden"))
POLICIES = HERE.parent / "configs" / "policies"
DATA = (".json", ".npz", ".npy")


class Case:
    """One case of a golden file; a check must have read every output by its end."""

    def __init__(self, record: dict, arrays: dict[str, np.ndarray], inputs: Path | None):
        self.params, self.inputs = record["params"], inputs
        self.unread = {name: arrays[f"{record['id']}__{name}"] for name in record["outputs"]}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.unread.pop(name)


@functools.cache
def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@functools.cache
def built(name: str, changes: str):
    """The policy that configs/policies/<name>.yaml describes, with constructor arguments changed (JSON)."""
    config = yaml.safe_load((POLICIES / f"{name}.yaml").read_text())
    for component, arguments in json.loads(changes).items():
        config[component].setdefault("init_args", {}).update(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return load_policy(path)


def policy(name: str, **changes: dict):
    return built(name, json.dumps(changes, sort_keys=True))


def scored(case: Case, policy) -> Tensor:
    """Scores [B, H, T] of the case's inputs; the originals of query-head granularity repeat keys and values first."""
    inputs = {name: torch.from_numpy(array) for name, array in arrays_of(case.inputs).items()}
    queries, keys, values = inputs["q"], inputs["k"], inputs["v"]
    if case.params.get("granularity") == "query_head":
        group = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    before = max(keys.shape[2] - policy.scorer.window, 0)
    return policy.scorer(observation(queries[:, :, before:], keys, values))


def observation(queries: Tensor, keys: Tensor, values: Tensor) -> Observation:
    (batch, heads, entries, dim), window = keys.shape, queries.shape[2]
    return Observation(
        layer_idx=0,
        queries=queries,
        query_positions=torch.arange(entries - window, entries).expand(batch, window),
        keys=keys,
        values=values,
        scaling=dim**-0.5,
        valid=torch.ones(batch, heads, entries, dtype=torch.bool),
        positions=torch.arange(entries).expand(batch, heads, entries),
    )


def budgets(policy, scores: Tensor, budget: float, layers: int = 1) -> Tensor:
    """Entries per head [L, B, H] as the allocator wishes them, before `fit`, at most all there are."""
    stacked = scores.expand(layers, *scores.shape)
    wanted = policy.allocator(stacked, None, torch.full((scores.shape[0],), budget, dtype=torch.float64))
    assert torch.equal(wanted, wanted.round()), "a table in print has whole numbers"
    return wanted.long().clamp(max=scores.shape[-1])


def kept(scores: Tensor, budget: Tensor) -> np.ndarray:
    """What `select` keeps of scores [..., S] with budget [...], as a mask."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[select(scores.flatten(0, -2), budget.flatten(), int(budget.sum()))] = True
    return mask.view_as(scores).numpy()


def assert_scores(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)


def assert_kept(got: np.ndarray, ranking: np.ndarray, want: np.ndarray) -> None:
    """Kept masks `got` [..., S] against kept positions `want` [..., C] (-1: none); the first entries, as many as
    `ranking` [..., n] has, were ranked by it, the others are kept in any case.

    Which of several entries with the same score a top-k returns is its own affair, and max pooling makes many of them:
    entries above the lowest kept score must be there, those below must not, and the number must be the same.
    """
    ranked = ranking.shape[-1]
    assert got[..., ranked:].all()
    rows = zip(
        got[..., :ranked].reshape(-1, ranked),
        np.broadcast_to(ranking, (*want.shape[:-1], ranked)).reshape(-1, ranked).astype(np.float64),
        want.reshape(-1, want.shape[-1]),
        strict=True,
    )
    for mine, score, theirs in rows:
        number = np.count_nonzero((theirs >= 0) & (theirs < ranked))
        assert np.count_nonzero(theirs >= ranked) == got.shape[-1] - ranked
        assert np.count_nonzero(mine) == number
        if number == 0:
            continue
        lowest = np.sort(score)[::-1][number - 1]
        margin = 1e-6 * abs(lowest)
        assert mine[score > lowest + margin].all(), "an entry with a higher score was evicted"
        assert not mine[score < lowest - margin].any(), "an entry with a lower score was kept"


def snapkv_arguments(params: dict, window_reduce: str) -> dict:
    return {
        "window": params["window"],
        "kernel_size": params["kernel"],
        "pooling": params["pooling"].removesuffix("pool"),
        "window_reduce": params.get("window_reduce", window_reduce),
        "group_reduce": params.get("group_agg") or "mean",
        "group_first": params.get("group_agg_position", "before_pooling") == "before_pooling",
    }


def past_and_protected(case: Case, policy) -> tuple[np.ndarray, Tensor]:
    """Golden scores of the past, checked against ours, and our scores with the whole window protected.

    Where the prompt is shorter than the capacity, the originals return it before they score anything.
    """
    scores = scored(case, policy)
    past = max(scores.shape[-1] - case.params["window"], 0)
    ours = scores[..., :past].numpy().copy()
    golden = case.unread.pop("scores", ours)
    assert_scores(ours, golden)
    scores[..., past:] = torch.inf
    return golden, scores


def check_snapkv(case: Case) -> None:
    snapkv = policy("snapkv", scorer=snapkv_arguments(case.params, "sum"))
    golden, scores = past_and_protected(case, snapkv)
    budget = budgets(snapkv, scores, case.params["capacity"])[0]
    assert_kept(kept(scores, budget), golden, case["kept"])


def check_pyramid_select(case: Case) -> None:
    params = case.params
    allocator = {"beta": params["beta"], "protected": params["window"], "rounding": "original"}
    pyramidkv = policy("pyramidkv", scorer=snapkv_arguments(params, "sum"), allocator=allocator)
    golden, scores = past_and_protected(case, pyramidkv)
    for layer, budget in enumerate(budgets(pyramidkv, scores, params["capacity"], params["num_layers"])):
        assert_kept(kept(scores, budget), golden, case[f"kept_l{layer}"])


def check_pyramid_table(case: Case) -> None:
    params = case.params
    tables = {"kept_len_kvcf": "original", "kept_len_adakv": "adakv", "n_kept": "kvpress"}
    for output in list(case.unread):
        allocator = {"beta": params["beta"], "protected": params["window"], "rounding": tables[output]}
        pyramidkv = policy("pyramidkv", allocator=allocator)
        budget = params["capacity"] if "capacity" in params else params["T"] * (1 - params["compression_ratio"])
        table = budgets(pyramidkv, torch.zeros(1, 1, params["T"]), budget, params["num_layers"])
        assert table.flatten().tolist() == case[output].tolist()


def check_adakv(case: Case) -> None:
    params = case.params
    allocator = {"floor": params["floor_alpha"], "rounding": "original", "normalize": bool(params["normalize"])}
    if params["pyramid"]:
        pyramid = {"beta": params["beta"], "protected": params["window"], "rounding": "adakv"}
        allocator["base"] = {"class_path": "learnkv.allocators.Pyramid", "init_args": pyramid}
    adakv = policy("adakv", scorer=snapkv_arguments(params, "mean"), allocator=allocator)
    golden, scores = past_and_protected(case, adakv)
    every = budgets(adakv, scores, params["capacity"], params.get("num_layers", 1))
    budget = every[params.get("layer_idx", 0)]
    assert (budget - params["window"]).flatten().tolist() == case["head_budgets"].flatten().tolist()
    assert_kept(kept(scores, budget)[0], golden[0], case["kept"])


def check_streaming_llm(case: Case) -> None:
    params = case.params
    capacity = params["capacity"]
    sinks = capacity - params["window"] if "window" in params else params.get("sinks", 4)
    streaming = policy("streaming_llm", scorer={"sinks": sinks})

    def trim(positions: Tensor, room: int) -> Tensor:
        """What stays of a cache that holds `positions` [S] when it may hold `room` entries."""
        blank = torch.zeros(1, 1, len(positions), 1)
        seen = observation(blank[:, :, :0], blank, blank)
        scores = streaming.scorer(Observation(**{**vars(seen), "positions": positions.view(1, 1, -1)}))
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


FAMILIES = {
    "snapkv_queryhead": check_snapkv,
    "snapkv_kvhead": check_snapkv,
    "pyramidkv_select": check_pyramid_select,
    "pyramidkv_budgets": check_pyramid_table,
    "kvpress_pyramid_budgets": check_pyramid_table,
    "adakv": check_adakv,
    "streamingllm": check_streaming_llm,
    "l2norm": check_knorm,
}


def family_of(stem: str) -> str | None:
    return next((family for family in FAMILIES if stem == family or stem.startswith(f"{family}_")), None)


def found(folder: Path) -> Iterator:
    """One pytest parameter (path without suffix, case number) per case; number None for a file without known cases."""
    for path in sorted({path.with_suffix("") for path in folder.rglob("*") if path.suffix in DATA}):
        sidecar = path.with_suffix(".json")
        if path.name.startswith("inputs_"):
            continue
        records = json.loads(sidecar.read_text())["cases"] if family_of(path.name) and sidecar.exists() else []
        for number, record in enumerate(records):
            yield pytest.param(path, number, id=f"{path.name}-{record['id']}")
        if not records:
            yield pytest.param(path, None, id=path.name)


def test_the_folder_holds_golden_files():
    assert list(found(FOLDER)), f"{FOLDER} holds no golden file"


@pytest.mark.parametrize("file", ["h2o_mha101.npz", "kvpress_mha101.json", "headkv_scores_s11.json", "curve.npy"])
def test_a_file_of_an_unknown_family_fails(file, tmp_path):
    (tmp_path / file).write_text("{}")
    (unknown,) = found(tmp_path)
    with pytest.raises(AssertionError, match=r"no check for a file of this family"):
        test_golden(*unknown.values)


@pytest.mark.parametrize(("path", "number"), list(found(FOLDER)))
def test_golden(path, number):
    family = family_of(path.name)
    assert family is not None, f"{path.name}: no check for a file of this family"
    assert number is not None, f"{path.name}: no cases beside the data"
    sidecar = json.loads(path.with_suffix(".json").read_text())
    inputs = path.with_name(sidecar["inputs_file"]) if sidecar["inputs_file"] else None
    case = Case(sidecar["cases"][number], arrays_of(path.with_suffix(".npz")), inputs)
    FAMILIES[family](case)
    assert not case.unread, f"{path.name}: no check for {', '.join(case.unread)}"
