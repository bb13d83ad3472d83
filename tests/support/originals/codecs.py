"""Codecs: codes, what they decode to, the schedules of what stays at full precision, and their bytes."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from learnkv import codecs
from learnkv.codecs.logquant import LogSparse
from learnkv.codecs.turboquant import lloyd_max
from learnkv.core.codec import Codec, Encoded, Rows
from learnkv.formats import tensors
from support.originals.comparing import assert_scores
from support.originals.loading import Case
from support.originals.loading import codec as codec_of

TIES = 2e-3
"""Fraction of codes that may differ by one level, where numbers lie halfway between two."""


def assert_decoded(got: Tensor, want: np.ndarray, step: float | np.ndarray = np.inf) -> None:
    """Equal but for a few codes at ties, which are one step apart."""
    assert tuple(got.shape) == want.shape
    apart = ~np.isclose(got.numpy(), want, rtol=2e-4, atol=1e-5 * np.abs(want).max())
    assert apart.mean() <= TIES
    assert (np.abs(got.numpy() - want) <= 1.01 * step)[apart].all()


def encoded(codec: Codec, heads: Tensor, rows: Rows | None = None) -> Encoded:
    """What the codec makes of [B, H, T, D]; its bytes are those of its formula."""
    *batch, slots, dim = heads.shape
    lengths = [slots] * math.prod(batch)
    made = codec.encode(heads.reshape(-1, dim), rows or Rows.of(lengths))
    assert made.nbytes == codec.nbytes(lengths, dim, heads.element_size())
    return made


def table(folder: str, **named: Tensor) -> str:
    return str(tensors.write(Path(folder) / "table.safetensors", named))


def check_kivi(case: Case) -> None:
    bits, group, x = case.params["bits"], case.params["group"], torch.from_numpy(case["x"])
    of_keys = case.params["what"] == "key"
    residual = group if of_keys else 0
    arguments = {"bits": bits, "group": group, "residual": residual, "scale_dtype": "float32"}
    codec = codec_of("kivi", "keys" if of_keys else "values", **arguments)
    made = encoded(codec, x)
    golden = {name: case[name] for name in ("code", "scale", "mn")}
    assert made.nbytes == sum(array.nbytes for array in golden.values())
    batch, heads, slots, dim = x.shape
    shape = (batch, heads, slots // group, dim, -1) if of_keys else (batch, heads, slots, dim // group, -1)
    codes, scale, low = (
        made.tensors[name].view(torch.int32 if name == "codes" else torch.float32).view(shape)
        for name in ("codes", "scale", "zero")
    )
    if of_keys:
        codes, scale, low = (part.transpose(3, 4) for part in (codes, scale, low))
    assert np.mean(codes.reshape(golden["code"].shape).numpy() != golden["code"]) <= TIES
    assert_scores(scale.reshape(golden["scale"].shape).numpy(), golden["scale"])
    assert_scores(low.reshape(golden["mn"].shape).numpy(), golden["mn"])
    assert_decoded(codec.decode(made).view(x.shape), case["deq"], golden["scale"].max())


def means(levels: Tensor) -> Tensor:
    """Means of a normal variable between the borders halfway to the neighbouring levels."""
    edges = torch.cat([torch.tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])]).double()
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    expected: Tensor = -density.diff() / torch.special.ndtr(edges).diff()
    return expected


def check_turboquant(case: Case) -> None:
    """Their bytes hold the highest bit first, ours the lowest; a rotation by signs needs theirs."""
    params, x, rotation = case.params, torch.from_numpy(case["x"]), torch.from_numpy(case["rotation"])
    bits, dim = params["bits"], x.shape[-1]
    with tempfile.TemporaryDirectory() as folder:
        path = table(folder, rotation=rotation)
        codec = codec_of("turboquant", "keys", bits=bits, table=path)
        made = encoded(codec, x.unsqueeze(0))
    if params["rotation"] == "qr":
        seeded = codec_of("turboquant", "keys", bits=bits, rotation="qr", seed=params["seed"]).basis(0, dim)
        assert seeded is not None
        assert_scores(seeded[0].T.numpy(), rotation.numpy(), atol=1e-5)
    assert_scores((lloyd_max(bits) / math.sqrt(dim)).numpy(), case["centroids"])
    assert_scores((means(lloyd_max(bits)) / lloyd_max(bits)).numpy(), case["correction"])
    assert_scores(made.tensors["norm"].numpy(), case["norms"])
    codes, packed = case["codes"], case["packed"]
    stream = np.unpackbits(made.tensors["codes"].numpy(), axis=-1, bitorder="little").reshape(len(x), dim, bits)
    mine = (stream << np.arange(bits)).sum(-1)
    assert np.mean(mine != codes) <= TIES
    assert made.tensors["codes"].shape == packed.shape
    theirs = np.unpackbits(packed, axis=-1).reshape(len(x), dim, bits)[..., ::-1]
    assert np.array_equal((theirs << np.arange(bits)).sum(-1), codes)
    decoded = codec.unrotate(codec.decode(made).unsqueeze(0))[0]
    assert_decoded(decoded, case["deq"])


def padded(entries: Sequence[int], size: int) -> list[int]:
    return [*entries, *[-1] * (size - len(entries))]


def check_logquant(case: Case) -> None:
    """What is exact; here an entry is coded once, in the original up to once per window."""
    params = case.params
    window, prompt = params["W"], params["prefill"]
    parts = LogSparse.of_prompt(prompt, window)
    logs, recent = case["log_index"], case["local_index"]
    partial = params["cache"] == "PartialLogQuantizedCache"
    keys, values = (
        cast(codecs.LogQuant, codec_of("logquant", part, window=window, log=log))
        for part, log in (("keys", True), ("values", not partial))
    )
    assert keys.exact(prompt).nonzero().flatten().tolist() == sorted(parts.log + parts.local)
    of_keys, of_values = case["requant"], case["requant_v"]
    for step in range(len(logs)):
        assert padded(parts.log, logs.shape[1]) == logs[step].tolist()
        assert padded(parts.local, recent.shape[1]) == recent[step].tolist()
        if step < len(of_keys):
            count = prompt + step + 1
            parts = parts.append(count - 1, window)
            exact = sorted(parts.log + parts.local)
            assert np.flatnonzero(of_keys[step] == 0).tolist() == exact
            wanted = values.exact(count).nonzero().flatten().tolist() if partial else exact
            assert np.flatnonzero(of_values[step] == 0).tolist() == wanted


def check_spherical_codes(case: Case) -> None:
    """Radii without rounding are theirs; with it, every one moves by half a step at most."""
    k, words, theta = (torch.from_numpy(case[name]) for name in ("k", "codebook", "theta"))
    groups, count, width = words.shape
    tier = {1: "high", 2: "mid", 3: "low"}[case.params["tier"]]
    arguments: dict[str, Any] = {"tier": tier}
    with tempfile.TemporaryDirectory() as folder:
        arguments["table"] = table(folder, **{tier: words[None, None]})
        exact, rounded = codecs.Spherical(page=0, **arguments), codecs.Spherical(**arguments)
    assert (exact.groups, 2**exact.bits, exact.bits) == (groups, count, case.params["bits"])
    made = encoded(exact, k.unsqueeze(0))
    radius = made.tensors["radii"]
    assert_scores(radius.numpy(), case["radius"])
    decoded = exact.decode(made)
    assert_decoded(decoded, (words[torch.arange(groups), theta.long()] * radius.unsqueeze(-1)).flatten(1).numpy())
    query = torch.from_numpy(case["q"]).view(groups, width)
    unit = (query / query.norm(dim=-1, keepdim=True)).flatten()
    assert_scores((decoded @ unit / math.sqrt(k.shape[1])).numpy(), case["logits"], atol=1e-5)
    small = encoded(rounded, k.unsqueeze(0))
    apart = (rounded.decode(small) - decoded).view(-1, groups, width).norm(dim=-1)
    assert (apart <= 0.51 * small.tensors["scale"].float() + 2**-11 * radius).all()


def check_spherical_tiers(case: Case) -> None:
    params, radii = case.params, torch.from_numpy(case["r_groups"])
    bits = {int(tier): count for tier, count in params["effective_bits"].items()}
    tiers = codecs.SphericalTiers(params["sink"], params["recent"], tuple(params["retrieved"]), bits)
    omega, later = (torch.from_numpy(case[name]) for name in ("omega", "omega_refresh"))
    budget = params["bits_per_token"] * omega.numel()
    chosen = tiers.allocate(radii, omega, budget)
    assert np.mean(chosen.numpy() != case["tier"]) <= TIES
    tightened = tiers.tighten(chosen, radii, later, params["refresh_factor"] * budget)
    assert np.mean(tightened.numpy() != case["tier_refresh"]) <= TIES


def check_spherical(case: Case) -> None:
    {"codes": check_spherical_codes, "allocate": check_spherical_tiers}[case.params["op"]](case)


def check_think(case: Case) -> None:
    params, q, k = case.params, torch.from_numpy(case["q"]), torch.from_numpy(case["k"])
    original = params["impl"] == "original"
    (batch, heads, slots, dim), window = k.shape, params["query_window" if original else "window"]
    recent = params["recent_size"] if original else 0
    codec = codec_of("think", "keys", ratio=params["ratio"], recent=recent, window=window)
    queries = q.reshape(batch * heads, -1, *q.shape[2:])
    made = encoded(codec, k, Rows.of([slots] * batch * heads, queries=queries))
    keep = np.zeros((batch * heads, dim), np.uint8)
    np.put_along_axis(keep, made.tensors["channels"].long().numpy(), 1, axis=-1)
    golden = case["keep"]
    assert np.array_equal(keep.reshape(golden.shape), golden)
    decoded = codec.decode(made).view(k.shape).numpy()
    old = slots - recent
    masked = k.numpy()[:, :, :old] * golden[:, :, None]
    assert np.array_equal(decoded[:, :, :old], masked)
    if not original:
        assert np.array_equal(decoded, case["k_out"])
        return
    assert np.array_equal(decoded[:, :, old:], case["recent"])
    assert np.array_equal(made.tensors["pruned"].view(batch, heads, old, -1).numpy(), case["pruned"])


FAMILIES = {
    "kivi": check_kivi,
    "turboquant_aither": check_turboquant,
    "logquant": check_logquant,
    "spherical_kv": check_spherical,
    "think": check_think,
}
