"""Rotations that are measured of a model's own queries, keys and values."""

from pathlib import Path

import pytest
import torch
from support.commands import calibrate
from support.models import Loaded
from torch import Tensor

from learnkv import load_model, prefill
from learnkv.calibration.covariance_rotations import covariance_rotations
from learnkv.calibration.trials import sample_trials
from learnkv.codecs import CovarianceRotation
from learnkv.core.codec import Rows
from learnkv.formats import tensors
from learnkv.ops.covariance_rotation import query_covariance, value_covariance


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model("reference")


@pytest.fixture(scope="module")
def contexts(loaded: Loaded) -> list[Tensor]:
    return [trial.context for trial in sample_trials(loaded[1], 128, 3, seed=3)]


@pytest.fixture(scope="module")
def table(loaded: Loaded, contexts: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tables") / "rotation.safetensors"
    return str(tensors.write(path, covariance_rotations(loaded[0], contexts[:2])))


def test_rotations_make_both_moments_alike_in_every_channel(loaded: Loaded, contexts: list[Tensor], table: str) -> None:
    """U makes them diagonal, a Hadamard matrix spreads them: all channels have their mean."""
    rotations = tensors.read(table, tensors.COVARIANCE_ROTATION)
    caches = [prefill(loaded[0], context, window=context.shape[1]) for context in contexts[:2]]
    for layer_idx in (0, 3):
        seen = [cache.compressed_layers()[layer_idx].observation() for cache in caches]
        keys, values = (
            torch.cat([getattr(obs, name)[0].transpose(0, 1) for obs in seen]) for name in ("keys", "values")
        )
        heads = keys.shape[1]
        queries = torch.cat([obs.queries[0].unflatten(0, (heads, -1)).permute(2, 0, 1, 3) for obs in seen])
        of_queries = query_covariance(queries)
        for part, moments in (("keys", of_queries), ("values", value_covariance(values, keys, of_queries))):
            rotation = rotations[part][layer_idx]
            variances = (rotation.mT @ moments @ rotation).diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(
                variances, variances.mean(-1, keepdim=True).expand_as(variances), rtol=1e-3, atol=1e-5
            )


def test_the_codec_turns_every_layer_and_head_by_its_own_rotation(
    loaded: Loaded, contexts: list[Tensor], table: str
) -> None:
    """Eight bits of a context that was not measured: logits are the model's own."""
    cache, codec = prefill(loaded[0], contexts[2], window=64), CovarianceRotation(table, bits=8, clip=0)
    for layer_idx, layer in enumerate(cache.compressed_layers()):
        obs = layer.observation()
        _, heads, slots, dim = obs.keys.shape
        queries = obs.queries[0].unflatten(0, (heads, -1)).flatten(1, 2)
        made = codec.encode(obs.keys.reshape(-1, dim), Rows.of([slots] * heads, layer_idx))
        logits = codec.rotate(queries, layer_idx) @ codec.decode(made).view(heads, slots, dim).mT
        wanted = queries @ obs.keys[0].mT
        assert (logits - wanted).square().mean() < 1e-4 * wanted.square().mean()


def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "covariance_rotation.safetensors"
    assert calibrate([f"out={tmp_path}", "only=covariance_rotation", "lengths=96", "samples=1"]) == 0
    assert capsys.readouterr().out.split() == [str(path)]
    assert CovarianceRotation(str(path), "values").basis(5, 32) is not None
