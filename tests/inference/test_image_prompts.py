"""Prompts with images: what transformers computes, compressed, padded, forked and stored like prompts of text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.masking import masked_logits
from support.models import assert_logits_close, tokens
from support.vision import FAMILIES, IMAGE, IN_SPACE, attached, continued, plain, prompt, together
from torch import Tensor
from transformers import DynamicCache

from learnkv import Policy, continuation, generate, load_cache, load_policy, prefill, save_cache
from learnkv.allocators import AdaKV
from learnkv.errors import UserError
from learnkv.inference.models import attention_layers, config_hash, describe_model, empty_model
from learnkv.scorers import SnapKV

SPLIT, NEW = 40, 6
pytestmark = pytest.mark.compat
every_family = pytest.mark.parametrize("family", FAMILIES)
POLICY = Policy(SnapKV(window=8), AdaKV())


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def question(seed: int = 9) -> Tensor:
    return tokens(1, NEW, seed) % 90 + 1


def untouched(family: str, seed: int = 0) -> Tensor:
    """Logits [1, S + T, V] of the untouched model for prompt and question."""
    ids, inputs = prompt(family, SPLIT, seed)
    whole = torch.cat([ids, question()], 1)
    return plain(family)(input_ids=whole, **continued(inputs, NEW)).logits


@every_family
def test_an_attached_model_is_the_untouched_one(family: str) -> None:
    ids, inputs = prompt(family, SPLIT)
    logits = [
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config), **inputs).logits
        for model in (plain(family), attached(family))
    ]
    assert torch.equal(*logits)


@every_family
def test_everything_is_kept_as_transformers_keeps_it(family: str) -> None:
    ids, inputs = prompt(family, SPLIT)
    cache = prefill(attached(family), ids, inputs=inputs)
    assert_logits_close(continuation(attached(family), question(), cache.fork()), untouched(family)[:, SPLIT:])
    whole = torch.cat([ids, question()], 1)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(whole)}
    expected = plain(family).generate(whole, **settings, **continued(inputs, NEW))[:, whole.shape[1] :]
    assert torch.equal(generate(attached(family), question(), cache, max_new_tokens=5), expected)


@every_family
def test_the_image_matters_and_its_entries_can_be_evicted(family: str) -> None:
    ids, inputs = prompt(family, SPLIT)
    cache = prefill(attached(family), ids, policy=POLICY, keep=0.4, inputs=inputs)
    assert cache.spent == [pytest.approx(0.4, abs=0.01)]
    kept = {
        layer: [cache.kept_positions(layer, 0, head) for head in range(cache.layers[layer].heads)]
        for layer in cache.compressible
    }
    of_image = (ids[0] == IMAGE).nonzero().flatten()
    assert any(0 < torch.isin(of_image, part).sum() < len(of_image) for heads in kept.values() for part in heads)
    position = int(cache.next_positions())
    assert (position < SPLIT) == (family in IN_SPACE)
    got = continuation(attached(family), question(), cache)[0]
    assert_logits_close(got, masked_logits(plain(family), ids[0], question()[0], kept, inputs, position))
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    changed = continuation(attached(family), question(), prefill(attached(family), ids, inputs=other))
    assert (changed - untouched(family)[:, SPLIT:]).abs().max() > 1e-3


@every_family
def test_left_padded_rows_are_read_as_alone(family: str) -> None:
    rows = [prompt(family, SPLIT), prompt(family, SPLIT - 9, seed=1)]
    ids, mask, inputs = together(*rows)
    cache = POLICY.compress(prefill(attached(family), ids, mask, policies=[POLICY], inputs=inputs), keep=0.5)
    cache.batch_select_indices(torch.tensor([1, 0]))
    said = torch.cat([question(2), question(3)])
    both = continuation(attached(family), said, cache)
    for row, (own, given) in enumerate(reversed(rows)):
        alone = POLICY.compress(prefill(attached(family), own, policies=[POLICY], inputs=given), keep=0.5)
        assert_logits_close(both[row], continuation(attached(family), said[row : row + 1], alone)[0])


@every_family
def test_live_caches_do_not_know_each_other(family: str) -> None:
    rows = [prompt(family, SPLIT, seed) for seed in (0, 1)]

    def read(row: int) -> Any:
        ids, inputs = rows[row]
        return POLICY.compress(prefill(attached(family), ids, policies=[POLICY], inputs=inputs), keep=0.5)

    expected = [continuation(attached(family), question(), read(row)) for row in (0, 1)]
    first, second = read(0), read(1)
    for cache, logits in ((first, expected[0]), (second, expected[1])):
        assert torch.equal(continuation(attached(family), question(), cache), logits)


@every_family
def test_a_stored_cache_goes_on_behind_its_image(family: str, tmp_path: Path) -> None:
    ids, inputs = prompt(family, SPLIT)
    cache = prefill(attached(family), ids, policies=[POLICY], inputs=inputs)
    loaded = load_cache(save_cache(cache, tmp_path), attached(family))
    for keep in (1.0, 0.4):
        caches = [POLICY.compress(part.fork(), keep=keep) for part in (cache, loaded)]
        assert torch.equal(*(continuation(attached(family), question(), part) for part in caches))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_embeddings_in_place_of_ids(chunk_size: int | None) -> None:
    model, ids = attached("qwen2_5_vl"), tokens(2, SPLIT) % 90 + 1
    embeds = {"inputs_embeds": model.get_input_embeddings()(ids)}
    blank = torch.ones_like(ids)
    caches = [prefill(model, blank, chunk_size=chunk_size, inputs=embeds), prefill(model, ids)]
    said = torch.cat([question(2), question(3)])
    assert_logits_close(*(continuation(model, said, cache) for cache in caches))


def test_embeddings_with_an_image_have_its_positions() -> None:
    model, (ids, inputs) = attached("qwen2_5_vl"), prompt("qwen2_5_vl", SPLIT)
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = features
    given = {"inputs_embeds": embeds, "image_grid_thw": inputs["image_grid_thw"]}
    cache = prefill(model, ids, chunk_size=11, inputs=given)
    assert_logits_close(continuation(model, question(), cache), untouched("qwen2_5_vl")[:, SPLIT:])


def test_refusals() -> None:
    model, (ids, inputs) = attached("qwen2_5_vl"), prompt("qwen2_5_vl", SPLIT)
    with pytest.raises(UserError, match="chunk_size=8: prompts with images are read whole"):
        prefill(model, ids, chunk_size=8, inputs=inputs)
    with pytest.raises(UserError, match="inputs: pixels is no further argument of Qwen2_5_VL"):
        prefill(model, ids, inputs={"pixels": ids})
    with pytest.raises(UserError, match="inputs: position_ids is no further argument"):
        prefill(model, ids, inputs={"position_ids": ids})
    with pytest.raises(UserError, match="image_grid_thw is missing"):
        prefill(model, ids, inputs={"pixel_values": inputs["pixel_values"]})
    with pytest.raises(UserError, match="inputs_embeds of shape"):
        prefill(model, ids, inputs={"inputs_embeds": torch.zeros(1, 3, 32)})
    cache = prefill(model, ids, inputs=inputs)
    whole = torch.cat([ids, question()], 1)
    with pytest.raises(UserError, match="does not know the positions after the images"):
        model.generate(whole, past_key_values=cache.fork(), max_new_tokens=2)
    with pytest.raises(UserError, match="without beams"):
        generate(model, question(), cache.fork(), max_new_tokens=2, num_beams=2)
    with pytest.raises(UserError, match="images of this prompt have positions in space"):
        load_policy("expected_attention").compress(
            prefill(model, ids, policies=[load_policy("expected_attention")], inputs=inputs), keep=0.5
        )


def test_a_vision_language_model_is_built_from_its_config(tmp_path: Path) -> None:
    plain("qwen2_5_vl").config.save_pretrained(tmp_path)
    model = empty_model(str(tmp_path))
    assert type(model) is type(plain("qwen2_5_vl"))
    assert describe_model(model)["shapes"] == describe_model(plain("qwen2_5_vl"))["shapes"]
    names = [f"model.language_model.layers.{layer}.self_attn" for layer in range(2)]
    assert attention_layers(str(tmp_path), config_hash(model)) == names
