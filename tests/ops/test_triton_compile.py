"""Every kernel compiles for sm_90 and sm_80 without a GPU; the hot ones without spilling and within shared memory."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = {90: 227 * 1024, 80: 163 * 1024}
"""Shared memory of a processor that programs may use, bytes."""

REGISTERS = 65536

TIERS = ("d64 g7 tiers", "d128 g4 tiers 88", "d128 g4 tiers 44", "d128 g4 tiers 33", "d128 g7 graphed tiers")
"""Decode steps of one token that read entries in fewer bits."""

Row = dict[str, int | str]


@functools.cache
def compiled(capability: int, *words: str) -> list[Row]:
    script = Path(__file__).parents[1] / "support" / "ahead_of_time.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, str(script), str(capability), *words], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def rows(kernel: str, case: str = "") -> list[Row]:
    found = [row for row in compiled(90) if row["kernel"] == kernel and case in str(row["case"])]
    assert found, (kernel, case)
    return found


def test_every_kernel_compiles_and_none_spills() -> None:
    kernels = {"_attend", "_merge", "_count_digits", "_count_kept", "_write", "_gather"}
    kernels |= {"_quantize", "_dequantize"}
    kernels |= {"_split_normalisers", "_join_normalisers", "_reduce_weights", "_pool"}
    kernels |= {"_enclose", "_score", "_list_slots"}
    kernels |= {"_attend_gated", "_query_gradient", "_entry_gradient", "_slot_gradient"}
    assert {row["kernel"] for row in compiled(90)} == kernels
    assert [row for row in compiled(90) if spills(row) or int(row["shared"]) > SHARED[90]] == []


def spills(row: Row) -> bool:
    """Whether a kernel's stack holds more than the array with which a cosine reduces its argument."""
    return int(row["spilled"]) > (32 if "rotated" in str(row["case"]) else 0)


def test_sm_80() -> None:
    words = (
        "decode d128 g7",
        "by query head",
        "pages",
        "quantize d128",
        "select",
        "rotated",
        "window d128",
        "gated d128",
        "gradient d64",
        "terms",
    )
    assert len(compiled(80, *words)) == len([row for row in compiled(90) if any(w in str(row["case"]) for w in words)])
    assert [row for row in compiled(80, *words) if spills(row) or int(row["shared"]) > SHARED[80]] == []


@pytest.mark.parametrize("case", ["d64 g7", "d96 g1", "d128 g4", "d128 g7 graphed", "d128 g4 paged", *TIERS])
def test_two_programs_of_a_decode_step_share_a_processor(case: str) -> None:
    """The grid has two programs per processor, which must run at the same time."""
    for row in rows("_attend", f"decode {case}"):
        if row["case"] == f"decode {case}":
            assert 2 * int(row["shared"]) <= SHARED[90]
            assert 2 * int(row["registers"]) * 32 * int(row["warps"]) <= REGISTERS


def test_keys_and_values_are_read_sixteen_bytes_at_a_time() -> None:
    for row in rows("_attend"):
        assert int(row["wide_copies"]) >= 8, row
    (plain,) = (row for row in rows("_attend", "decode d128 g4") if row["case"] == "decode d128 g4")
    for case in ("88", "44", "22"):  # three words of 3 bits are read one by one
        (row,) = rows("_attend", f"d128 g4 tiers {case}")
        assert int(row["wide_copies"]) > int(plain["wide_copies"])
    for row in rows("_gather"):
        assert int(row["wide_loads"]) >= 8, row
    for row in rows("_quantize"):
        assert int(row["wide_loads"]) + int(row["wide_copies"]) >= 3, row
    for case in ("b4", "b8"):  # words of 3 bits cross the bytes of sixteen
        assert all(row["wide_loads"] for row in rows("_dequantize", f"d128 {case}"))
    for kernel in ("_enclose", "_score"):
        assert all(int(row["wide_loads"]) + int(row["wide_copies"]) for row in rows(kernel))
    for kernel in ("_split_normalisers", "_attend_gated", "_query_gradient", "_entry_gradient", "_slot_gradient"):
        for row in rows(kernel):
            assert int(row["wide_copies"]) >= 6, row


def test_tensor_cores_are_used() -> None:
    """One step has too few rows for wgmma; questions and windows have enough."""
    assert all(row["mma"] for row in rows("_attend", "decode d128 g4") if row["case"] == "decode d128 g4")
    assert all(row["mma"] for row in rows("_score"))
    assert all(row["wgmma"] for row in rows("_attend", "t64"))
    assert all(row["wgmma"] for name in ("_split_normalisers", "_reduce_weights") for row in rows(name))
    training = [*rows("_attend_gated"), *(row for row in compiled(90) if "_gradient" in str(row["kernel"]))]
    assert all(row["wgmma"] or row["mma"] for row in training if "fp32" not in str(row["case"]))
    assert all(row["wgmma"] for row in training if str(row["case"]).endswith("d128 g4"))
