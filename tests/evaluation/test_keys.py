"""Stored samples are known only while everything that can change their numbers is the same."""

import functools
import importlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learnkv.errors import UserError
from learnkv.evaluation import sources
from learnkv.evaluation.config import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.keys import policy_digest
from learnkv.evaluation.tasks.answers import Answers, tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.formats.files import TABLES
from learnkv.persistence.policies import build_policy, load_policy

SCORER = """
from learnkv.scorers import Scorer
from {helper} import FACTOR

class Mine(Scorer):
    def forward(self, obs):
        return FACTOR * obs.keys.float().norm(dim=-1)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A policy of the user's own scorer, which imports a file beside it; called again it reads the files anew."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"mine_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}_helper.py").write_text("FACTOR = 1.0\n")
    (tmp_path / f"{name}.py").write_text(SCORER.format(helper=f"{name}_helper"))

    def load() -> Any:
        for module in (name, f"{name}_helper"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return build_policy({"scorer": {"class_path": f"{name}.Mine"}}, (name,))

    return load, tmp_path / f"{name}.py", tmp_path / f"{name}_helper.py"


def test_a_line_of_a_scorers_code_counts(mine: Any) -> None:
    load, file, _ = mine
    before = policy_digest(load())
    assert policy_digest(load()) == before
    file.write_text(file.read_text().replace("FACTOR * obs", "-FACTOR * obs"))
    assert policy_digest(load()) != before


def test_a_line_of_a_file_that_it_imports_counts(mine: Any) -> None:
    load, _, helper = mine
    before = policy_digest(load())
    helper.write_text("FACTOR = -2.0\n")
    assert policy_digest(load()) != before


def test_a_method_that_is_replaced_at_run_time_counts(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = mine[0]()
    before = policy_digest(policy)
    monkeypatch.setattr(type(policy.scorer), "forward", lambda self, obs: obs.keys.float().sum(-1))
    assert policy_digest(policy) != before


def test_a_class_without_a_file_counts_by_its_code() -> None:
    def policy(line: Any) -> Any:
        space = {"__name__": "typed_in"}
        exec(f"from learnkv.scorers import Scorer\nclass Typed(Scorer):\n  def forward(self, obs):\n    {line}", space)
        made = load_policy("knorm")
        made.scorer = space["Typed"]()
        return made

    assert policy_digest(policy("return obs.keys.sum(-1)")) == policy_digest(policy("return obs.keys.sum(-1)"))
    assert policy_digest(policy("return obs.keys.sum(-1)")) != policy_digest(policy("return obs.keys.amax(-1)"))


def test_the_files_of_the_package_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources.rooms_digest()
    copy = tmp_path / "learnkv"
    shutil.copytree(sys.modules["learnkv"].__path__[0], copy, ignore=shutil.ignore_patterns("*.safetensors", "*.npy"))
    monkeypatch.setattr(sys.modules["learnkv"], "__path__", [str(copy)])
    assert sources.rooms_digest.__wrapped__() == before
    for changed in ("ops/select/reference.py", "codecs/per_token.py"):
        file = copy / changed
        file.write_text(file.read_text() + "\nLAST = 1\n")
        assert sources.rooms_digest.__wrapped__() != before
        before = sources.rooms_digest.__wrapped__()


def test_the_table_of_a_policy_counts_and_its_place_does_not(tmp_path: Path) -> None:
    spec = load_policy("lukv").spec()

    def digest(file: Any) -> Any:
        spec["allocator"]["init_args"]["curve"] = str(file)
        return policy_digest(build_policy(spec))

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(TABLES / "lukv.npy", tmp_path / folder / "curve.npy")
    before = digest(tmp_path / "a" / "curve.npy")
    assert digest(tmp_path / "b" / "curve.npy") == before
    curve = np.load(TABLES / "lukv.npy")
    curve.flat[-1] += 0.001
    np.save(tmp_path / "b" / "curve.npy", curve)
    assert digest(tmp_path / "b" / "curve.npy") != before


@pytest.mark.parametrize("value", [torch.ones(3), np.ones(3), 2.0, {"a": [1.0]}])
def test_what_a_scorer_holds_as_a_plain_attribute_counts(value: Any) -> None:
    policy = load_policy("knorm")
    before = policy_digest(policy)
    policy.scorer.table = value
    with_value = policy_digest(policy)
    policy.scorer.table = {"a": [2.0]} if isinstance(value, dict) else value * 2
    assert len({before, with_value, policy_digest(policy)}) == 3


class Holder:
    def __init__(self, value: float) -> None:
        self.value, self.owner = value, self


def linear(value: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1, dtype=torch.float32)
    torch.nn.init.constant_(layer.weight, value)
    torch.nn.init.zeros_(layer.bias)
    return layer


HELD = {
    "object": Holder,
    "function": lambda value: lambda x: x * value,
    "partial": lambda value: functools.partial(max, value),
    "method": lambda value: Holder(value).__eq__,
    "module in a list": lambda value: [linear(value)],
    "numpy scalar": np.float32,
    "bytes": lambda value: repr(value).encode(),
    "type of numbers": lambda value: torch.float16 if value == 1.0 else torch.float32,
}


@pytest.mark.parametrize("kind", HELD)
def test_objects_and_functions_that_a_scorer_holds_count_by_their_content(kind: str) -> None:
    policy = load_policy("knorm")
    digests = []
    for value in (1.0, 2.0, 1.0):
        policy.scorer.held = HELD[kind](value)
        digests.append(policy_digest(policy))
    assert digests[0] == digests[2] != digests[1]


def test_a_hook_of_a_scorer_counts() -> None:
    policy = load_policy("knorm")
    before = policy_digest(policy)
    policy.scorer.register_forward_hook(lambda module, args, output: -output)
    assert policy_digest(policy) != before


def test_what_has_no_known_content_is_refused() -> None:
    policy = load_policy("knorm")
    policy.scorer.held = threading.Lock()
    with pytest.raises(UserError, match="a policy holds a lock, whose content is not known"):
        policy_digest(policy)


def test_digests_are_the_same_in_every_process() -> None:
    load = f"import runpy\ncode_text = runpy.run_path({sources.__file__!r})['code_text']\n"  # without torch
    code = "code = compile(\"x in {'a', 'b', 'c'}\", '', 'eval')\nprint(code_text(code))"
    command = [sys.executable, "-c", load + code]
    texts = {
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True).stdout
        for seed in ("1", "2", "3")
    }
    assert len(texts) == 1


def test_the_place_of_the_model_that_a_policy_was_trained_for_does_not_count(tmp_path: Path) -> None:
    policy = load_policy("reference")
    before = policy_digest(policy)
    policy.trained_for, policy.other_weights = {"id": str(tmp_path)}, f"trained for {tmp_path}"
    assert policy_digest(policy) == before


def test_every_shipped_policy_has_its_own_digest_and_keeps_it() -> None:
    names = ("reference", "snapkv", "kvzip", "headkv", "duo_attention", "quest", "fast_kvzip")
    first, again = ([policy_digest(load_policy(name)) for name in names] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(names)


def fingerprints(family: Any, model: Any) -> Any:
    (job,) = jobs_of(model, {"knorm": load_policy("knorm")}, [Budget(keep=0.5)])[1:]
    return {job.fingerprint(prompt) for prompt in family.prompts}


def test_the_version_of_a_task_counts(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt("text", 48, "query_agnostic", 0, [2, 3, 4], [5, 6])]
    before = fingerprints(Text(prompts), loaded[0])
    assert fingerprints(Text(prompts), loaded[0]) == before
    monkeypatch.setattr(Text, "version", 2)
    assert not fingerprints(Text(prompts), loaded[0]) & before


@pytest.mark.parametrize("kind", [Text, Answers])
def test_the_tokenizer_and_its_chat_template_count(loaded: Any, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    model, tokenizer = loaded
    prompts = [Prompt("text", 48, "query_agnostic", 0, [2, 3, 4], [5, 6])]
    before = fingerprints(kind(prompts, tokenizer), model)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0]['content'] }}!")
    assert not fingerprints(kind(prompts, tokenizer), model) & before


def test_what_changes_nothing_about_a_prompt_changes_no_key(loaded: Any) -> None:
    from learnkv.data.sample import Sample

    sample = Sample("Red is 1.", "\nWhat?", " It", ["1"], "vt", 6)
    prompts = list(tokenised([(0, sample)], "query_agnostic", 64, loaded[1]))
    assert fingerprints(Answers(prompts, loaded[1]), loaded[0]) == fingerprints(Answers(prompts, loaded[1]), loaded[0])
    assert prompts[0].text == "Red is 1.\nWhat? It"
