"""Variants differ from their methods in one thing, and are compared with them prompt by prompt."""

from pathlib import Path

import torch
from support.observations import observe

from experiments.ablations.method_variants import UPWARDS, LargestKeys, table, variants
from learnkv import load_policy
from learnkv.allocators import Pyramid
from learnkv.formats import tensors
from learnkv.scorers import Knorm


def test_a_variant_differs_from_its_method_in_one_thing(tmp_path: Path) -> None:
    moments = tensors.write(
        tmp_path / "m.safetensors", {"mean": torch.ones(2, 4, 8), "covariance": torch.ones(2, 4, 8, 8)}
    )
    changed = variants(tmp_path, moments)
    for name, (beside, policy) in changed.items():
        ours, theirs = policy.spec(), load_policy(beside).spec()
        (part,) = [part for part in theirs if ours[part] != theirs[part]]
        one, other = ours[part], theirs[part]
        if one["class_path"] == other["class_path"]:
            arguments = other["init_args"]
            assert sum(one["init_args"][key] != value for key, value in arguments.items()) == 1, name


def test_upwards_is_the_pyramid_from_the_last_layer_to_the_first() -> None:
    scores = torch.zeros(6, 1, 2, 1000)
    pyramid = Pyramid(beta=20, protected=0)(scores, None, torch.tensor([300]))[:, 0, 0]
    upwards = torch.tensor(UPWARDS, dtype=torch.float64)
    torch.testing.assert_close(pyramid.flip(0) / pyramid.sum(), upwards / upwards.sum())


def test_the_largest_keys_come_first() -> None:
    seen = observe([20])
    torch.testing.assert_close(LargestKeys()(seen), -Knorm()(seen))


def test_differences_are_paired_by_prompt_and_every_task_counts_the_same() -> None:
    """Of "vt" two prompts, of "niah_single_1" one: 50 and 100 for the variant, 25 and 0 for its method."""
    scored = {("snapkv", "vt"): (50, 0), ("snapkv", "niah_single_1"): (0,)}
    scored |= {("wide", "vt"): (75, 25), ("wide", "niah_single_1"): (100,)}
    about = {"metric": "generated", "length": 1, "setting": "query_aware"}
    records = [
        {**about, "policy": name, "task": task, "index": at, "keep": keep, "score": score}
        for (name, task), scores in scored.items()
        for keep in (0.5, 0.25, 0.1)
        for at, score in enumerate(scores)
    ]
    lines = list(table(records, {"wide": "snapkv"}))
    assert lines[2].startswith("| snapkv |  | 12 ± nan | 12 ± nan |")
    assert lines[3].startswith("| wide | snapkv | 75 ± nan · +62 ± nan |")
    twice = [one | {"index": one["index"] + 2 * copy} for copy in range(2) for one in records]
    assert list(table(twice, {"wide": "snapkv"}))[3].startswith("| wide | snapkv | 75 ± 7 · +62 ± 0 |")
