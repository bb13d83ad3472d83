"""OScaR's norms, quantiser and schedule; OSCAR's rotations and codes."""

import tempfile
from typing import cast

import numpy as np
import torch

from learnkv import codecs
from learnkv.codecs.covariance_rotation import clipped
from learnkv.codecs.oscar_norm import Norm
from learnkv.ops.covariance_rotation import Order, bit_reversal, compose, query_covariance, value_covariance
from learnkv.ops.hadamard import hadamard
from learnkv.ops.quantize import Grid, dequantize, quantize
from support.originals.codecs import assert_decoded, encoded, table
from support.originals.comparing import assert_scores
from support.originals.loading import Case, codec

NORMS: dict[str | bool, Norm] = {
    False: "none",
    "norm_l2": "l2",
    "norm_rsqrt": "l2",  # 1 / rsqrt of the sum of squares
    "norm_max": "max",
    "norm_L1": "mean_abs",
}


def check_oscar_quantizer(case: Case) -> None:
    """Groups along tokens are padded with zeros; here blocks leave no part of a group."""
    params, x = case.params, torch.from_numpy(case["x"])
    vectors = x.transpose(2, 3) if params["per_channel"] else x
    count, group = vectors.shape[-1], params["groupsize"]
    grid: Grid = "symmetric" if params["sym"] else "zero_in_range" if group < 0 else "zero_point"
    group = count if group < 0 else group
    padded = torch.nn.functional.pad(vectors, (0, -count % group))
    made = quantize(padded, params["bits"], group, grid, torch.float32)
    decoded = dequantize(made, params["bits"], padded.shape[-1], grid)[..., :count]
    assert_decoded(decoded.transpose(2, 3) if params["per_channel"] else decoded, case["deq"], float(made.scale.max()))


def check_oscar_norm(case: Case) -> None:
    """Every codec of one norm over all heads divides by it; `rsqrt` is the L2 norm by another way."""
    x = torch.from_numpy(case["x"])
    norm = NORMS[case.params["method"]]
    made = encoded(codecs.TokenNorm(codecs.PerToken(8, "none"), norm, x.shape[1], "float32"), x)
    norms, golden = made.tensors["norm"], case["norm"]
    assert_scores(norms.numpy(), golden.flatten())
    assert_scores((x / norms.view(golden.shape)).numpy(), case["y"], atol=1e-5)


def check_oscar_schedule(case: Case) -> None:
    """All entries at once are what the prompt and one token after the other become."""
    params, (k, v) = case.params, (torch.from_numpy(case[name]) for name in "kv")
    heads, total = k.shape[1], k.shape[2]
    norm = NORMS[params["k_norm_factoring"]]
    residual, blocks = params["residual_length"], params["v_flush_mode"] == "block"
    shared = {"residual": residual, "scale_dtype": "float32"}
    arguments = {"bits": params["k_bits"], "group": params["k_groupsize"], "norm": norm, "heads": heads}
    arguments |= {"rotate_entries": params.get("k_token_rotation", False)}
    of_keys = cast(codecs.OScaRKeys, codec("oscar_token_norm", "keys", **arguments, **shared))
    arguments = {"bits": params["v_bits"], "group": params["v_groupsize"], "blocks": blocks}
    of_values = cast(codecs.OScaRValues, codec("oscar_token_norm", "values", **arguments, **shared))
    assert_scores(of_keys.rotate(k[0]).numpy(), case["k_rot"][0], atol=1e-4)
    assert_decoded(of_keys.decode(encoded(of_keys, k)).view(k.shape), case["k_state"])
    values = of_values.unrotate(of_values.decode(encoded(of_values, v)).view(v.shape[1:])).unsqueeze(0)
    assert_decoded(values, case["v_state"])
    lengths = range(params["prefill"], total + 1)
    stored = [[int((~codec.exact(length)).sum()) for codec in (of_keys, of_values)] for length in lengths]
    assert stored == case["committed"].tolist()


def check_oscar_token_norm(case: Case) -> None:
    if case.params["op"] == "hadamard":
        x = torch.from_numpy(case["x"])
        assert_scores((x @ hadamard(x.shape[-1])).numpy(), case["y"], atol=1e-4)
    else:
        checks = {"quantizer": check_oscar_quantizer, "norm": check_oscar_norm, "schedule": check_oscar_schedule}
        checks[case.params["op"]](case)


def check_oscar_rotation(case: Case) -> None:
    """Signs of eigenvectors are anybody's: rotations are composed of the stored ones."""
    q, k, v = (torch.from_numpy(case[name]) for name in "qkv")
    dim, heads = q.shape[-1], k.shape[1]
    of_queries = query_covariance(q.unflatten(1, (heads, -1)))
    of_values = value_covariance(v, k, of_queries)
    assert np.array_equal(bit_reversal(dim).numpy(), case["bitrev"])
    assert_scores(hadamard(dim).numpy(), case["hadamard"])
    for name, covariance in (("k", of_queries.mean(0)), ("v", of_values.mean(0))):
        sigma, golden = case[f"sigma_{name}"], case[f"eig_{name}"]
        assert_scores(covariance.numpy(), sigma, atol=1e-5 * np.abs(sigma).max())
        values, vectors = torch.from_numpy(golden), torch.from_numpy(case[f"U_{name}"])
        assert_scores(torch.linalg.eigvalsh(covariance).numpy(), golden, atol=1e-5 * golden.max())
        assert_scores(compose(torch.eye(dim), values, "r_pbr").numpy(), case[f"P_{name}"])
        orders: dict[str, Order] = {"r_h_pbr": "r_h_pbr", "br": "r_pbr", "r_h": "r_h", "h_r_pbr": "h_r_pbr"}
        for stored, order in orders.items():
            assert_scores(compose(vectors, values, order).numpy(), case[f"R_{name}_{stored}"], atol=1e-5)


def check_oscar_int2(case: Case) -> None:
    """The codec with a rotation that changes nothing."""
    params, x = case.params, torch.from_numpy(case["x"])
    dim, clip = x.shape[-1], params["clip_ratio"]
    assert_scores(np.where(clip == 0, 1e30, clipped(x, clip).abs().amax(-1).numpy()), case["threshold"], rtol=2e-3)
    with tempfile.TemporaryDirectory() as folder:
        path = table(folder, keys=torch.eye(dim)[None, None])
        group = dim // params["num_groups"]
        arguments = {"table": path, "clip": clip, "group": group, "scale_dtype": "float32"}
        stored = codec("oscar_rotation", "keys", **arguments)
        heads = x.transpose(0, 1)
        made = encoded(stored, heads)
        decoded = stored.decode(made).view(heads.shape).transpose(0, 1)
    for name in ("deq", "deq_sim"):
        if name in case:
            assert_decoded(decoded, case[name], float(made.tensors["scale"].max()))


def check_oscar(case: Case) -> None:
    {"rotation": check_oscar_rotation, "int2": check_oscar_int2}[case.params["op"]](case)


FAMILIES = {"oscar_token_norm": check_oscar_token_norm, "oscar_rotation_int2": check_oscar}
