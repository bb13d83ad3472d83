"""The table of all methods: nothing is left out, and orders are compared where differences are clear."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.method_comparison import tables
from experiments.method_comparison.published import ORDERS, Published, pairs
from learnkv.errors import UserError
from learnkv.inference.models import REFERENCE
from learnkv.persistence.methods import select_methods
from learnkv.persistence.named_configs import CONFIGS
from learnkv.persistence.policies import load_policy

RESULTS = CONFIGS.parent / "docs" / "results"
CONFIG = yaml.safe_load((CONFIGS / "eval" / "method_comparison.yaml").read_text(encoding="utf-8"))


def test_every_policy_is_compared_but_those_that_evict_while_tokens_are_generated() -> None:
    left_out = set(select_methods()) - set(select_methods(CONFIG["baselines"]))
    online = {name for name in select_methods() if load_policy(name).evict_interval}
    assert left_out == online == set(select_methods(["online"]))
    assert {"h2o_decode", "rkv_decode", "cake_decode", "snapstream"} <= online


def test_every_published_method_is_compared() -> None:
    assert {name for order in ORDERS for name in order.scores} <= set(select_methods(CONFIG["baselines"]))


def test_the_tasks_are_those_that_the_model_can_do() -> None:
    card = (REFERENCE / "README.md").read_text(encoding="utf-8")
    scores = re.findall(r"^\| (\w+) \| [\d-]+ \| [^|]+ \| ([\d.]+) ±", card, re.MULTILINE)
    assert CONFIG["tasks"] == [task for task, score in scores if float(score) >= 80]


def test_the_findings_name_every_disagreement_with_a_published_order() -> None:
    orders = json.loads((RESULTS / "method_comparison.json").read_text(encoding="utf-8"))["orders"]
    findings = (RESULTS / "method_comparison_findings.md").read_text(encoding="utf-8")
    named = re.findall(r"^- `(\w+)` above `(\w+)`", findings, re.MULTILINE)
    assert set(named) == {(pair["better"], pair["worse"]) for pair in orders if pair["verdict"] == "disagrees"}


def record(
    policy: str, index: int, score: int, keep: float = 0.1, task: str = "vt", setting: str = "query_agnostic"
) -> dict[str, Any]:
    about = {"policy": policy, "metric": "generated", "task": task, "length": 1024, "setting": setting, "index": index}
    size = {"spent": keep, "bytes": 10.0, "bytes_full": 100.0, "haystack": None, "asked": keep, "budget": None}
    return {**about, **size, "keep": keep, "score": score, "fingerprint": f"{policy}{keep}{setting}{task}{index}"}


SCORES = {
    "full": [100, 100, 100, 100],
    "snapkv": [50, 0, 50, 0],
    "kvzip": [100, 75, 100, 75],
    "keydiff": [50, 0, 25, 0],
    "knorm": [50, 25, 25, 0],
}


def records(setting: str = "query_agnostic") -> list[dict[str, Any]]:
    return [
        record(name, index, score, 1.0 if name == "full" else 0.1, setting=setting)
        for name, scores in SCORES.items()
        for index, score in enumerate(scores)
    ]


def test_pairs_of_a_published_order_get_the_verdict_of_the_paired_difference() -> None:
    order = Published("them", "query_agnostic", 0.12, {"snapkv": 90.0, "kvzip": 60.0, "keydiff": 30.0, "knorm": 29.5})
    found = {(pair.better, pair.worse): pair for pair in pairs(records(), [order])}
    assert len(found) == 6
    clear = found["snapkv", "kvzip"]
    assert (clear.verdict, clear.keep, clear.ours, clear.n) == ("disagrees", 0.1, (25.0, 87.5), 4)
    assert clear.difference == -62.5
    assert clear.stderr == pytest.approx(7.2169, abs=1e-4)
    assert found["kvzip", "keydiff"].verdict == "agrees"
    assert found["snapkv", "knorm"].verdict == "undecided"  # 0 ± 10.2
    assert found["keydiff", "knorm"].verdict == "tied"


def test_settings_are_not_mixed() -> None:
    order = Published("them", "query_aware", 0.1, {"snapkv": 90.0, "kvzip": 60.0})
    assert list(pairs(records(), [order])) == []
    assert len(list(pairs(records() + records("query_aware"), [order]))) == 1


def test_prompts_that_a_method_has_not_finished_are_left_out() -> None:
    some = records() + records("query_aware")
    some.remove(record("kvzip", 2, 100))
    kept = tables.complete(some)
    assert {(one["setting"], one["index"]) for one in kept} == {
        *(("query_agnostic", index) for index in (0, 1, 3)),
        *(("query_aware", index) for index in range(4)),
    }
    assert [one["policy"] for one in kept if one["setting"] == "query_aware"][::4] == list(SCORES)


def test_the_page_says_what_made_it_and_names_what_disagrees(tmp_path: Path) -> None:
    asked = {"model": "reference", "ckpt": ["quest"], "baselines": ["snapkv", "knorm"], "samples": 4}
    asked |= {"tasks": ["vt", "cwe"], "lengths": [1024], "setting": ["query_agnostic"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asked))
    few = [one | {"task": "cwe", "fingerprint": f"cwe{at}"} for at, one in enumerate(records()) if one["index"] < 2]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records() + few))
    tables.write(tables.TablesConfig(results=str(tmp_path), out=str(tmp_path), commit="abc"), "")
    text = (tmp_path / "method_comparison.md").read_text(encoding="utf-8")
    assert "the first 4 tokens of a prompt\nand the last 8 (every method that evicts)." in text
    assert "Full cache, query-agnostic: vt 100.0." in text
    assert "4 prompts that every method has finished,\nof tasks with 10 or more.\n8 are requested" in text
    assert "cwe" not in text.split("at commit")[1]
    assert "method_comparison_findings.md" not in text
    typed = (
        "`python eval.py config=method_comparison baselines=snapkv,knorm tasks=vt,cwe setting=query_agnostic samples=4`"
    )
    assert f"{typed} at commit\nabc: model `reference`" in text
    assert "| keydiff | snapkv | 0.1 | 65.3 : 23.6 | 18.8 : 25.0 | -6.2 ± 6.2 |" in text.split("### Undecided")[1]
    assert "| kvzip | snapkv | 0.1 | 92.3 : 23.6 | 87.5 : 25.0 | +62.5 ± 7.2 |" in text
    assert "| snapkv | **25.0 ± 14.4** · 10 B · 0.100 |" in text
    written = (tmp_path / "method_comparison.json").read_text(encoding="utf-8")
    held = json.loads(written)
    assert sum(line.startswith('  {"policy": ') for line in written.splitlines()) == len(held["rows"]) == 5
    assert {row["policy"]: row["score"] for row in held["rows"]}["kvzip"] == 87.5
    assert held["orders"][0]["verdict"] == "agrees"
    (tmp_path / "method_comparison_findings.md").touch()
    tables.write(tables.TablesConfig(results=str(tmp_path), out=str(tmp_path), commit="abc"), "")
    assert "[method_comparison_findings.md](method_comparison_findings.md)" in (
        tmp_path / "method_comparison.md"
    ).read_text(encoding="utf-8")


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"results={tmp_path}: expected a folder of")):
        tables.write(tables.TablesConfig(results=str(tmp_path), out=str(tmp_path), commit="abc"), "")


def test_answers_that_were_read_are_ordered_by_kl_under_a_name_of_their_own(tmp_path: Path) -> None:
    asked = {"baselines": ["snapkv"], "score": "forced", "keep": [0.1], "samples": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "reference", **asked}))
    few = [one | {"metric": "forced", "kl": 0.01 * (100 - one["score"])} for one in records()]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in few))
    tables.write(tables.TablesConfig(results=str(tmp_path), out=str(tmp_path), name="forced", commit="abc"), "")
    text = (tmp_path / "forced.md").read_text(encoding="utf-8")
    assert "config=method_comparison baselines=snapkv keep=0.1 score=forced samples=4` at commit" in text
    assert "ours are KL from the full cache" in text
    assert "| kvzip | snapkv | 0.1 | 92.3 : 23.6 | 0.125 : 0.750 | +0.625 ± 0.072 |" in text.split("### Agrees")[1]
    assert (tmp_path / "forced.json").is_file()
