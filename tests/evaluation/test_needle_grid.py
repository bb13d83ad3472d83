"""Needles on a grid of depths and lengths, and the heat maps of their scores."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import eval
from support.models import Loaded

from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.needle_pictures import needle_maps
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks.base import Prompt


def load(loaded: Loaded, names: str = "needle_grid_single", **keys: Any) -> list[Prompt]:
    suite = SuiteKeys(depths=keys.pop("depths", (0, 50, 100)), needles=keys.pop("needles", 2))
    settings = {"lengths": (384,), "samples": 2, **keys}
    config = EvalConfig(tasks=tuple(names.split(",")), suite=suite, **settings)
    return [prompt for family in tasks.load(config, loaded[1], 512) for prompt in family.prompts]


@pytest.fixture
def essays(tmp_path: Path) -> str:
    file = tmp_path / "hens.txt"
    file.write_text(" ".join(f"Hen {number} sat on a gate." for number in range(400)))
    return str(file)


def places(prompt: Prompt) -> list[float]:
    """Where the needles begin, in percent of the other words of the context."""
    assert prompt.sample is not None
    words = prompt.sample.context.split("\n", 1)[1].split()
    found = [next(i for i, word in enumerate(words) if answer in word) for answer in prompt.sample.answers]
    needle, others = 7, len(words) - 7 * len(found)  # words of a needle, the answer the last
    return [100 * (place - needle * number + 1) / others for number, place in enumerate(sorted(found), 1)]


def hay(prompt: Prompt) -> tuple[str, ...]:
    """The sentences that are there whatever tokens the needle costs."""
    assert prompt.sample is not None
    return tuple(re.findall(r"Hen \d+ sat on a gate\.", prompt.sample.context)[:12])


def test_needles_lie_at_their_depths_and_prompts_fill_the_length(loaded: Loaded, essays: str) -> None:
    prompts = load(loaded, lengths=(256, 384), haystack=essays)
    assert len(prompts) == 2 * 2 * 3
    for prompt in prompts:
        assert prompt.sample is not None
        (place,) = places(prompt)
        assert abs(place - (prompt.sample.depth or 0)) < 12
        assert prompt.length - 20 < prompt.room <= prompt.length
    assert sorted({prompt.index for prompt in prompts}) == list(range(6))


def test_prompts_of_one_number_differ_in_the_place_of_the_needle_alone(loaded: Loaded, essays: str) -> None:
    texts: dict[int, set[tuple[str, ...]]] = {}
    for prompt in load(loaded, haystack=essays):
        texts.setdefault(prompt.index // 3, set()).add(hay(prompt))
    assert [len(same) for same in texts.values()] == [1, 1]
    assert len(texts[0] | texts[1]) == 2


def test_several_needles_begin_at_the_depth_and_are_all_asked_for(loaded: Loaded, essays: str) -> None:
    keys = {"depths": (20,), "lengths": (448,), "needles": 2, "haystack": essays}
    for prompt in load(loaded, "needle_grid_multi", **keys):
        assert prompt.sample is not None
        assert prompt.sample.depth == 20
        assert places(prompt) == pytest.approx([20, 60], abs=12)
        assert prompt.sample.score(prompt.sample.answers[0]) == 0.5


def test_the_haystack_is_a_file_of_ones_own(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "essays.txt").write_text("A hen sat on a gate. " * 50)
    for prompt in load(loaded, haystack=str(tmp_path / "essays.txt")):
        assert prompt.sample is not None
        assert "A hen sat on a gate." in prompt.sample.context
        assert prompt.haystack == "essay:essays.txt"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"depths": (0.0, 101.0)}, "suite.depths=0,101: expected percentages of the haystack, 0 to 100"),
        ({"depths": ()}, "suite.depths=: expected percentages"),
        ({"depths": (5, 5)}, "suite.depths=5,5: a depth occurs twice"),
        ({"needles": 1}, "suite.needles=1: expected at least 2"),
        ({"max_new_tokens": 0}, "suite.max_new_tokens=0: expected at least 1"),
    ],
)
def test_keys_out_of_range(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        SuiteKeys(**keys)


def record(policy: str, score: float, length: int, depth: float, **more: Any) -> dict[str, Any]:
    keep = {"keep": 1.0 if policy == "full" else 0.1, "budget": None}
    about = {"task": "needle_grid_single", "setting": "query_agnostic", "metric": "generated"}
    return {"policy": policy, "score": score, "length": length, "depth": depth, **keep, **about, **more}


def test_maps_have_the_mean_of_every_cell() -> None:
    records = [record("full", 100, length, depth) for length in (64, 128) for depth in (0, 50)]
    records += [record("knorm", 100, 64, 0), record("knorm", 0, 64, 0), record("knorm", 0, 128, 50)]
    records += [record("knorm", 7, 64, 0, task="niah_single_2"), record("full", 7, 64, 0, metric="forced")]
    maps = needle_maps(records)
    names = ["needles-needle_grid_single-query_agnostic.png", "needles-needle_grid_single-query_agnostic-forced.png"]
    assert list(maps) == names
    full, knorm = (axis for axis in maps[names[0]].axes if axis.images)
    assert (full.get_title(), knorm.get_title()) == ("full, everything kept", "knorm, keep 0.1")
    np.testing.assert_array_equal(np.asarray(full.images[0].get_array()), [[100, 100], [100, 100]])
    shown = np.ma.filled(knorm.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(shown, [[50, np.nan], [np.nan, 0]])
    assert knorm.images[0].get_clim() == (0, 100)


def test_an_evaluation_writes_its_maps(model_folder: Path, tmp_path: Path) -> None:
    words = [f"model={model_folder}", "ckpt=knorm", "tasks=needle_grid_single", "suite.depths=0,100", "samples=1"]
    assert eval([*words, "lengths=256,320", "keep=0.5", "suite.max_new_tokens=4", f"output={tmp_path}"]) == 0
    assert (tmp_path / "needles-needle_grid_single-query_agnostic.png").stat().st_size > 1000


def test_depths_that_are_one_place_are_measured_each(loaded: Loaded, essays: str) -> None:
    first, second, other = load(loaded, depths=(0, 0.1, 100), samples=1, haystack=essays)
    assert first.prefill_ids == second.prefill_ids != other.prefill_ids
    assert len({prompt.digest for prompt in (first, second, other)}) == 3
