"""Every benchmark runs through on a CPU, small; parts are merged whatever became of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, decode, kernels, merge, prefill, report, step_memory, train_step
from benchmarks.limits import Work
from benchmarks.results import Clock, Part
from benchmarks.targets import TARGETS
from benchmarks.timing import Timing, input_sets, race

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU"),
    pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:divide by zero"),
]

PAGED = ("page_bounds", "page_scores", "paged step", "unpaged step")
FEWER_BITS = ("decode_tiers", "quantize_entries")
TRAINED = ("gated forward", "gated backward")
SCRIPTS = {
    "ceilings": (ceilings, {"bw_copy", "bw_read", "flops", "t_node_us", "host_op_us"}),
    "kernels": (kernels, {"decode_attention", *FEWER_BITS, "window_scores", "select", "gather_kv", *PAGED, *TRAINED}),
    "decode": (decode, {"decode step", "capacity"}),
    "prefill": (prefill, {"prefill"}),
    "step_memory": (step_memory, {"train: memory of a step"}),
    "train_step": (train_step, {"train: prefill", "train: teacher", "train: student, forward and backward"}),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the part of every script."""
    folder = tmp_path_factory.mktemp("parts")
    for name, (script, _) in SCRIPTS.items():
        script.main(["--dry-run", "--out", str(folder / f"{name}.json")])
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_writes_all_of_its_rows(parts: Path, name: str) -> None:
    part = json.loads((parts / f"{name}.json").read_text())
    assert part["finished"]
    assert part["environment"]["dry_run"]
    assert {row["kernel"] for row in part["rows"]} == SCRIPTS[name][1]
    # What a CPU does not have.
    peers = ("Could not run 'aten::_flash_attention_forward'", "FlexAttention does not support backward on CPU")
    assert [row for row in part["rows"] if not any(peer in row.get("failed", peer) for peer in peers)] == []
    timed = [row for row in part["rows"] if "t_us" in row]
    if name != "decode":  # differences of two turns, which noise may turn negative at this size
        assert all(row["t_us"] > 0 and row["t_us_repeat"] > 0 for row in timed)
    assert all(row["err"] < 1e-2 for row in timed if "err" in row)


def test_all_contenders_are_there(parts: Path) -> None:
    rows = json.loads((parts / "kernels.json").read_text())["rows"]
    for kernel, peers in {
        "decode_attention": {"learnkv", "flash varlen", "sdpa flash", "sdpa cudnn"},
        "decode_tiers": {"learnkv"},
        "quantize_entries": {"learnkv", "torch"},
        "window_scores": {"learnkv", "torch"},
        "select": {"learnkv", "torch.topk, sort"},
        "gather_kv": {"learnkv", "torch.index_select"},
        "gated forward": {"learnkv", "flex_attention", "SDPA with a bias"},
        "gated backward": {"learnkv", "flex_attention"},
        "page_bounds": {"learnkv", "torch"},
        "page_scores": {"learnkv", "torch"},
    }.items():
        assert {row["impl"] for row in rows if row["kernel"] == kernel} == peers
    widths = {row["case"] for row in rows if row["kernel"] == "decode_tiers"}
    assert {"k16v16", "k8v8", "k4v4", "k3v3", "k2v2"} <= widths
    steps = json.loads((parts / "decode.json").read_text())["rows"]
    assert {row["impl"] for row in steps} == set(decode.CONTENDERS)


def test_the_merged_document(parts: Path) -> None:
    document = merge.merge(parts)
    found = document["environment"]
    assert found["ceilings_measured"]
    assert {"gpu", "sha", "torch", "triton", "transformers"} <= set(found)
    assert all(part["finished"] for part in found["parts"].values())
    ours = [row for row in document["rows"] if row.get("impl") == "learnkv" and "bytes" in row]
    assert len(ours) >= 8
    assert all({"kernel", "impl", "t_us", "t_limit_us", "frac", "share", "n_launch"} <= set(row) for row in ours)
    assert all(row["frac"] >= row["share"] > 0 for row in ours if row["kernel"] != "decode step")
    assert len(document["summary"]) == len(TARGETS)
    assert {one["pass"] for one in document["summary"]} == {None}  # nothing was measured on a GPU
    assert "not measured on a GPU yet" in report.text([])


def test_limits_and_peers_of_a_row() -> None:
    """Ours 10 us for 21.5 MB at 4.3 TB/s and two nodes of 1.2 us: 5 of 10 us are bytes, 7.4 the limit."""
    rows = [
        {"part": "kernels", "kernel": "decode_attention", "impl": impl, "B": 8, "t_us": us, "traffic": "read"}
        | {"bytes": 21.5e6, "flops": 1.0, "n_launch": 2}
        for impl, us in (("learnkv", 10.0), ("flash varlen", 15.0), ("sdpa flash", 4.0))
    ]
    rows[1]["part"] = "a part of its own"
    rows.append(rows[0] | {"B": 1, "t_us": 6.0})
    for row in rows:
        merge.add_limit(row, merge.DATASHEET)
    merge.add_peers(rows)
    assert rows[0]["share"] == pytest.approx(0.5)
    assert rows[0]["frac"] == pytest.approx(0.74)
    assert rows[0]["peer"] == pytest.approx({"flash varlen": 1.5, "sdpa flash": 0.4})
    assert "peer" not in rows[1]
    assert "peer" not in rows[3]
    assert "above_limit" in rows[2]
    assert "above_limit" not in rows[0]


def test_a_part_is_on_disk_after_every_row(tmp_path: Path) -> None:
    part = Part(tmp_path / "one.json", "one", dry_run=True)
    part.add(Timing(2.0, 2.5, "graph"), Work(8e3, launches=1), kernel="select", impl="learnkv", B=None)
    part.add("OutOfMemoryError: no", kernel="select", impl="torch")
    held = json.loads((tmp_path / "one.json").read_text())
    assert not held["finished"]
    first, second = held["rows"]
    assert first == {
        "kernel": "select", "impl": "learnkv", "t_us": 2.0, "t_us_repeat": 2.5, "how": "graph",
        "bytes": 8e3, "flops": 0, "n_launch": 1, "traffic": "read",
    }  # fmt: skip
    assert second["failed"] == "OutOfMemoryError: no"
    (tmp_path / "two.json").write_text((tmp_path / "one.json").read_text().replace('"one"', '"two"'))
    document = merge.merge(tmp_path)
    assert not document["environment"]["ceilings_measured"]
    assert len(document["rows"]) == 4


def test_a_contender_that_fails_does_not_stop_the_others() -> None:
    def fail() -> None:
        raise ValueError("no such\nthing")

    found = race({"one": [lambda: None], "two": [fail], "three": [lambda: None]})
    assert found["two"] == "ValueError: no such thing"
    assert isinstance(found["one"], Timing)
    assert isinstance(found["three"], Timing)


@pytest.mark.parametrize(("nbytes", "sets"), [(1e3, 251659), (16e6, 16), (128e6, 2), (5e9, 2)])
def test_inputs_go_round_until_the_cache_has_forgotten_them(nbytes: float, sets: int) -> None:
    assert input_sets(nbytes, dry_run=False) == sets


def test_targets_are_judged(tmp_path: Path) -> None:
    """A document of a GPU with three rows: one target reached, one missed, the others open; the report says so."""
    base = {"part": "x", "model": "Llama-3.1-8B", "traffic": "read", "flops": 1.0, "n_launch": 2, "t_us_repeat": 1.0}
    call = base | {"kernel": "decode_attention", "impl": "learnkv", "skew": "uniform", "B": 8, "budget": 4096}
    step = base | {"kernel": "decode step", "impl": "learnkv graphed", "skew": "uniform", "B": 1, "T": 131072}
    rows = [
        call | {"bytes": 134e6, "t_us": 35.0},
        call | {"skew": "adakv", "bytes": 134e6, "t_us": 50.0},
        step | {"budget": 2048, "bytes": 15.3e9, "t_us": 4300.0, "n_launch": 0},
        step | {"budget": 2048, "bytes": 32.2e9, "t_us": 8600.0, "n_launch": 0, "impl": "full cache graphed"},
    ]
    env = {"gpu": "NVIDIA H200", "sha": "abc1234", "dry_run": False, "date": "2026-12-01"}
    env |= {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
    junit = "<testsuites><testsuite><testcase classname='t' name='a'/><testcase classname='t' name='b'><failure/>"
    (tmp_path / "tests-gpu.xml").write_text(junit + "</testcase></testsuite></testsuites>")
    part = {"part": "x", "finished": True, "seconds": 1.0, "environment": env, "rows": rows}
    (tmp_path / "x.json").write_text(json.dumps(part))
    merge.main([str(tmp_path), "--into", str(tmp_path / "results")])
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "h200-abc1234.json"
    summary = {(one["item"], one["condition"]): one for one in json.loads(file.read_text())["summary"]}
    large = summary["decode attention", ">= 128 MB per call, equal heads"]
    assert large["value"] == pytest.approx(134e6 / 4.3e6 / 35)
    assert large["pass"] is True
    skewed = summary["decode attention", "heads as unequal as AdaKV's, same entries"]
    assert skewed["value"] == pytest.approx(50 / 35)
    assert skewed["pass"] is False
    assert summary["decode step", "Llama-3.1-8B, B=1, 128k, 2048 kept"]["value"] == pytest.approx(4.3)
    assert sum(one["pass"] is None for one in summary.values()) == len(TARGETS) - 3

    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(["--results", str(tmp_path / "results"), "--document", str(page)])
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "**missed**" in text
    assert text.count("reached") == 2
    assert "NVIDIA H200, commit abc1234" in text
    assert "| 2.00 of 2.10 |" in text  # what the bytes allow is 32.2 / 15.3
    assert "Ceilings were not measured in this run" in text
    assert "GPU tests: 1 passed, 1 failed, 0 skipped (t::b)." in text
    assert {one.name for one in (tmp_path / "performance").iterdir()} == {"limit.png", "peers.png"}


def test_the_gpu_run_loses_nothing_when_parts_die_or_hang(tmp_path: Path) -> None:
    """With an interpreter in whose hands one part hangs, one dies, and the others write what they should."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!{sys.executable}
import json, pathlib, subprocess, sys, time
words = sys.argv[1:]
if words[:2] == ["-m", "benchmarks.merge"]:
    sys.exit(subprocess.run([sys.executable, *words]).returncode)
if words[0] == "-c" or words[:2] == ["-m", "pytest"]:
    sys.exit(3)
name, out = words[1].split(".")[-1], pathlib.Path(words[words.index("--out") + 1])
env = {{"gpu": "none", "sha": "x", "dry_run": True, "date": "d"}}
out.write_text(json.dumps({{"part": out.stem, "finished": False, "seconds": 0, "environment": env,
                           "rows": [{{"kernel": out.stem}}]}}))
if name == "decode":
    time.sleep(60)
if name == "prefill":
    sys.exit("killed")
"""
    )
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "PARTS": str(tmp_path / "parts"), "DRY_RUN": "1"}
    environment |= {"PART_LIMIT": "5"}  # what hangs is waited for, what does not has time on a busy machine too
    ran = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "run_gpu.sh")], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (merged,) = (tmp_path / "parts" / "merged").iterdir()
    document = json.loads(merged.read_text())
    left_a_file = {"ceilings", "kernels-only-decode", "decode", "prefill", "train_step"}
    assert set(document["environment"]["parts"]) >= left_a_file
    assert "decode: status 124" in ran.stdout
    assert any(line.startswith("decode 124 ") for line in document["environment"]["status"])


def test_the_page_says_what_was_measured() -> None:
    """`python -m benchmarks.report` changes nothing."""
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    between = page.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert between == report.text(report.documents(ROOT / "benchmarks" / "results"))


def test_a_clock_runs_out() -> None:
    assert Clock(-1).over()
    assert not Clock(100).over()
