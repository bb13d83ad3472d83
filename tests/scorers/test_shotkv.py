"""Units of a prompt, and that they are kept as a whole."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.models import attached, tokens
from support.observations import observe
from support.tables import made_up

from learnkv import Policy, load_model, prefill
from learnkv.calibration.text_units import text_units
from learnkv.errors import UserError
from learnkv.formats import unit_ends
from learnkv.formats.files import TABLES
from learnkv.scorers import ShotKV

ENDS = {"sentence": [1, 2, 3], "line": [2, 3], "paragraph": [3]}


@pytest.fixture
def ends(tmp_path: Path) -> str:
    return str(unit_ends.write(tmp_path / "ends.json", ENDS))


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("sentence", [0, 0, 1, 2, 2, 3, 4, 4, 5]),
        ("line", [0, 0, 0, 1, 1, 2, 3, 3, 4]),
        ("paragraph", [0, 0, 0, 0, 0, 0, 1, 1, 2]),
    ],
)
def test_a_unit_ends_after_the_tokens_of_the_file(unit: str, expected: list[int], ends: str) -> None:
    obs = observe([9])
    obs = dataclasses.replace(obs, token_ids=torch.tensor([[9, 1, 2, 9, 2, 2, 9, 3, 9]]))
    assert ShotKV(ends, unit).units(obs).tolist() == [expected]


def test_a_units_score_is_its_mean_attention_over_all_heads(ends: str) -> None:
    obs = observe([12])
    ids = torch.tensor([[9, 9, 1, 9, 9, 9, 9, 1, 9, 1, 9, 9]])
    got = ShotKV(ends, "sentence", window=4)(dataclasses.replace(obs, token_ids=ids))
    assert torch.equal(got[:, 0], got[:, 1])
    attention = torch.zeros(12)
    counts = torch.tensor([min(4, 12 - position) for position in range(12)])
    for head in range(6):
        for place in range(8, 12):
            logits = obs.keys[0, head // 3, : place + 1] @ obs.queries[0, head, place - 4] * obs.scaling
            attention[: place + 1] += logits.softmax(-1) / counts[: place + 1]
    bounds, means = ((0, 3), (3, 8), (8, 10), (10, 12)), []
    for begin, end in bounds:
        expected = attention[begin:end].mean()
        torch.testing.assert_close(got[0, 0, begin], expected, rtol=1e-4, atol=1e-6)
        means.append(float(got[0, 0, begin]))
    for begin, end in bounds:  # the others follow, and no other unit comes between them
        own = got[0, 0, begin:end]
        assert bool((own.diff() < 0).all())
        assert not any(own[-1] <= mean < own[0] for mean in means)


def test_units_are_kept_whole_but_for_the_last() -> None:
    policy = Policy(ShotKV(made_up("ends", 3, 2, 2), "sentence"), sinks=0, recent=0)
    cache = prefill(attached("llama"), tokens(1, 90), policies=[policy])
    scorer, observations = policy.scorer, [layer.observation() for layer in cache.compressed_layers()]
    unit = scorer.units(observations[0])[0]
    small = policy.compress(cache, keep=0.4)
    for layer in small.compressible:
        kept = torch.zeros(90, dtype=torch.bool)
        kept[small.kept_positions(layer, 0, 0)] = True
        assert torch.equal(small.kept_positions(layer, 0, 0), small.kept_positions(layer, 0, 1))
        partly = [index for index in unit.unique() if 0 < kept[unit == index].float().mean() < 1]
        assert len(partly) <= 1
        for index in partly:
            members = kept[unit == index]
            assert members[: int(members.sum())].all()


def test_what_is_not_known_is_refused(tmp_path: Path, ends: str) -> None:
    with pytest.raises(UserError, match="reads of a prompt what is not held of later tokens"):
        Policy(ShotKV(ends), evict_interval=8)
    cache = prefill(attached("llama"), tokens(1, 40), window=32)
    with pytest.raises(UserError, match="reads the prompt's token ids: hand it to prefill"):
        Policy(ShotKV(ends)).compress(cache, keep=0.5)
    for text, word in (
        ("[1]", "a list of token ids for each of"),
        ('{"sentence": [], "line": [-1], "paragraph": []}', "for line"),
    ):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError, match=word):
            ShotKV(str(tmp_path / "wrong.json"))
    with pytest.raises(UserError, match="unit=word"):
        ShotKV(ends, "word")


def test_the_shipped_file_is_the_reference_models() -> None:
    _, tokenizer = load_model("reference")
    found = text_units(tokenizer)
    assert found == unit_ends.read(TABLES / "unit_ends.json")
    assert tokenizer.encode("a\n", add_special_tokens=False)[-1] in found["line"]
    assert set(found["paragraph"]) <= set(found["line"]) <= set(found["sentence"])
