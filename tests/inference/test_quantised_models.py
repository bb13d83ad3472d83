"""Models whose weights are quantised: attention and caches are theirs, and what is compressed is computed with them."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.masking import masked_logits
from support.models import assert_logits_close, build, tokens
from transformers import AutoModelForCausalLM, DynamicCache

from learnkv import Policy, attach, continuation, generate, load_cache, load_policy, prefill, save_cache
from learnkv.allocators import AdaKV
from learnkv.scorers import SnapKV

POLICY = Policy(SnapKV(window=8), AdaKV())
PROMPT, QUESTION = tokens(1, 40), tokens(1, 6, seed=1)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # what the packages' kernels take


def torchao_int8() -> Any:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int8WeightOnlyConfig())


def bitsandbytes_int8() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


KINDS = {kind.__name__: kind for kind in (torchao_int8, bitsandbytes_int8, bitsandbytes_nf4)}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build("llama", **WIDE).save_pretrained(path)
    return path


@functools.cache
def loaded(kind: str, folder: Path, copy: int) -> Any:
    """One of several models that are alike."""
    config = KINDS[kind]()
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, attn_implementation="sdpa", device_map="cpu"
    ).eval()


@every_kind
def test_everything_kept_is_the_quantised_model_itself(kind: str, folder: Path) -> None:
    plain, ours = loaded(kind, folder, 0), attach(loaded(kind, folder, 1))
    exact = build("llama", **WIDE)
    whole = torch.cat([PROMPT, QUESTION], 1)
    theirs = DynamicCache(config=plain.config)
    parts = [plain(part, past_key_values=theirs).logits for part in (*PROMPT.split(13, 1), QUESTION)]
    expected = parts[-1]  # in the same parts: LLM.int8 scales the tokens of a pass together
    assert (expected - exact(whole).logits[:, 40:]).abs().max() > 1e-3  # its weights are others
    cache = POLICY.compress(prefill(ours, PROMPT, chunk_size=13, policies=[POLICY]), keep=1.0)
    assert_logits_close(continuation(ours, QUESTION, cache.fork()), expected)
    answer = [int(expected[0, -1].argmax())]
    while len(answer) < 5:
        answer.append(int(plain(torch.tensor([answer[-1:]]), past_key_values=theirs).logits[0, -1].argmax()))
    assert generate(ours, QUESTION, cache, max_new_tokens=5)[0].tolist() == answer


@every_kind
def test_evicted_entries_are_masked_ones(kind: str, folder: Path) -> None:
    ours = attach(loaded(kind, folder, 1))
    cache = prefill(ours, PROMPT, policy=POLICY, keep=0.4)
    kept = {layer: [cache.kept_positions(layer, 0, head) for head in range(2)] for layer in cache.compressible}
    got = continuation(ours, QUESTION, cache)[0]
    assert_logits_close(got, masked_logits(loaded(kind, folder, 0), PROMPT[0], QUESTION[0], kept))


@every_kind
@pytest.mark.parametrize("name", ["expected_attention", "criticalkv"])
def test_policies_that_apply_the_layers(kind: str, name: str, folder: Path) -> None:
    ours, policy = attach(loaded(kind, folder, 1)), load_policy(name)
    whole = prefill(ours, PROMPT, policies=[policy])
    if name == "criticalkv":
        layer, obs = ours.model.layers[0].self_attn.o_proj, whole.compressed_layers()[0].observation()
        heads = torch.randn(3, obs.projection.shape[1], generator=torch.Generator().manual_seed(0))
        assert (layer(heads) - heads @ obs.projection.float().T).norm() < 0.02 * layer(heads).norm()
    cache = policy.compress(whole, keep=0.5)
    assert cache.spent == [pytest.approx(0.5, abs=0.01)]
    assert continuation(ours, QUESTION, cache).isfinite().all()


@every_kind
def test_a_stored_cache_is_that_of_its_weights(kind: str, folder: Path, tmp_path: Path) -> None:
    ours = attach(loaded(kind, folder, 1))
    cache = prefill(ours, PROMPT, policy=POLICY, keep=0.4)
    back = load_cache(save_cache(cache, tmp_path), attach(loaded(kind, folder, 2)))
    assert torch.equal(*(continuation(ours, QUESTION, part) for part in (cache, back)))
