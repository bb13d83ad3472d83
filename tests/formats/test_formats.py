"""Files of other projects: read, written again, and faults told in one line."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learnkv.errors import UserError
from learnkv.formats import duo, headkv, heads, layers, lukv


def test_head_scores_come_back_whatever_the_order_of_the_keys(tmp_path: Path) -> None:
    trials = [[[0.1, 0.25], [0.0, 1e-9]], [[3, 0.5], [0.7]]]
    file = headkv.write(tmp_path / "deep" / "scores.json", trials)
    assert file.read_text() == '{"0-0": [0.1, 0.25], "0-1": [0.0, 1e-09], "1-0": [3, 0.5], "1-1": [0.7]}'
    assert headkv.read(file) == trials
    file.write_text('{"1-1": [0.7], "1-0": [3, 0.5], "0-1": [0.0, 1e-09], "0-0": [0.1, 0.25]}')
    assert headkv.read(file) == trials
    assert headkv.mean_scores(trials).tolist() == [[0.175, 5e-10], [1.75, 0.7]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read: No such file"),
        ("not json", "expected JSON"),
        ("[1, 2]", "expected head scores"),
        ('{"0-0": [0.1], "1-x": [0.1]}', "'1-x'"),
        ('{"0-0": []}', "finite numbers for head 0-0"),
        ('{"0-0": [0.1, NaN]}', "finite numbers for head 0-0"),
        ('{"0-0": [true]}', "finite numbers for head 0-0"),
        ('{"0-0": [0.1], "0-1": [0.2], "1-1": [0.3]}', "head 1-0 of 2 layers of 2 is missing"),
    ],
)
def test_faults_of_head_scores_are_told(text: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=told) as error:
        headkv.read(file)
    assert str(error.value).startswith(str(file))


def test_a_pattern_comes_back_with_its_config(tmp_path: Path) -> None:
    gates = torch.tensor([[1.0, -0.0009765625], [0.5, 0.9921875]], dtype=torch.float64)
    duo.write(tmp_path, gates, 8, 24, {"lr": 0.02, "recent_size": 1})
    assert (tmp_path / "full_attention_heads.tsv").read_text() == (
        "1.000000000000000000e+00\t-9.765625000000000000e-04\n5.000000000000000000e-01\t9.921875000000000000e-01\n"
    )
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.02, "recent_size": 24, "sink_size": 8}
    pattern = duo.read(tmp_path)
    assert torch.equal(pattern.gates, gates)
    assert (pattern.sink, pattern.recent, pattern.config["lr"]) == (8, 24, 0.02)


@pytest.mark.parametrize(
    ("gates", "config", "told"),
    [
        ("1.0\t0.5\n", None, "config.json: cannot be read"),
        ("1.0\t0.5\n", "{}", "config.json: expected sink_size as a whole number, got None"),
        ("1.0\t0.5\n", "[]", "config.json: expected sink_size as a whole number, got None"),
        ("1.0 0.5\n", '{"sink_size": 1, "recent_size": 2}', "expected numbers between tabs"),
        ("1.0\t0.5\n1.0\n", '{"sink_size": 1, "recent_size": 2}', r"each of the same length; got \[1, 2\]"),
        ("", '{"sink_size": 1, "recent_size": 2}', "a row of gates per layer"),
        ("nan\t0.5\n", '{"sink_size": 1, "recent_size": 2}', "finite numbers"),
    ],
)
def test_faults_of_a_pattern_are_told(gates: str, config: str | None, told: str, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(gates)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=told):
        duo.read(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_a_curve_comes_back_in_its_own_type(dtype: str | type[Any], tmp_path: Path) -> None:
    curve = np.random.default_rng(0).random((99, 3, 2)).astype(dtype)
    np.save(tmp_path / "first.npy", curve)
    read = lukv.read(tmp_path / "first.npy")
    assert np.array_equal(read.numpy(), curve)
    again = np.load(lukv.write(tmp_path / "deep" / "curve.npy", read))
    assert np.array_equal(again, curve)
    assert again.dtype.itemsize == curve.dtype.itemsize


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (np.zeros((98, 3, 2)), r"expected a curve \[99, layers, kv heads\], got \[98, 3, 2\]"),
        (np.zeros((99, 6)), r"got \[99, 6\]"),
        (np.zeros((99, 3, 2), dtype=int), "floating point"),
        (np.full((99, 3, 2), np.nan), "finite"),
        (np.full((99, 3, 2), None), "expected numbers in .npy format"),
        (b"", "expected numbers in .npy format"),
        (pickle.dumps([1]), "expected numbers in .npy format"),
        (None, "cannot be read: No such file"),
    ],
)
def test_faults_of_a_curve_are_told_and_nothing_is_unpickled(
    held: bytes | np.ndarray[Any, Any] | None, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "curve.npy"
    if isinstance(held, bytes):
        file.write_bytes(held)
    elif held is not None:
        np.save(file, held, allow_pickle=True)
    with pytest.raises(UserError, match=told) as error:
        lukv.read(file)
    assert str(error.value).startswith(str(file))


def test_a_number_per_layer_comes_back(tmp_path: Path) -> None:
    file = layers.write(tmp_path / "layers.json", [3.5, 1, 0.25])
    assert file.read_text() == "[3.5, 1, 0.25]\n"
    assert layers.read(file).tolist() == [3.5, 1, 0.25]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"0": 1}', "expected a list of one number per layer, got dict"),
        ("[]", "expected a list of one number per layer"),
        ("[1, -2]", "at least 0"),
        ("[0, 0]", "one of them above it"),
        ('[1, "2"]', "expected numbers, layer 0 has '2'"),
        ("[1, true]", "expected numbers"),
    ],
)
def test_faults_of_layers_are_told(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(UserError, match=told):
        layers.read(tmp_path / "layers.json")


@pytest.mark.parametrize("write", [lambda f: layers.write(f, [1]), lambda f: lukv.write(f, torch.zeros(99, 1, 1))])
def test_a_file_that_cannot_be_written_is_told(write: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "a file" / "table")


def test_a_figure_per_head_comes_back(tmp_path: Path) -> None:
    scores = torch.tensor([[0.5, 0.125], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    file = heads.write(tmp_path / "heads.json", scores)
    assert file.read_text() == '{"shape": [3, 2], "score": [[0.5, 0.125], [1.0, 0.0], [0.25, 0.75]]}\n'
    assert torch.equal(heads.read(file), scores)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[1, 2]]", "expected head scores"),
        ('{"score": [1, 2]}', "one list of scores per layer"),
        ('{"score": [[1], [1, 2]]}', "each of the same length"),
        ('{"shape": [2, 1], "score": [[1, 2]]}', r"expected shape \[2, 1\], got \[1, 2\]"),
        ('{"score": [[1, NaN]]}', "finite numbers"),
    ],
)
def test_faults_of_figures_per_head_are_told(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(text)
    with pytest.raises(UserError, match=told):
        heads.read(file)
