"""RoPE whose angles depend on the number of tokens: exact, or refused before a number is made."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import assert_logits_close, build, padded, plain, tokens
from transformers import DynamicCache

from benchmarks.meters import Counts, Meter
from learnkv import CompressedCache, Policy, attach, continuation, generate, load_policy, prefill
from learnkv.errors import UserError
from learnkv.inference.models import context_length
from learnkv.scorers import StreamingLLM

pytestmark = pytest.mark.compat

SWITCH = 48
FACTORS = {"rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.5 * (1 + pair) for pair in range(8)]}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": SWITCH,
        **FACTORS,
    },
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": SWITCH,
}
KINDS = {"longrope": ("phi3", LONGROPE), "dynamic": ("llama", DYNAMIC), "dynamic qwen2": ("qwen3", DYNAMIC)}
every_kind = pytest.mark.parametrize("kind", KINDS)
MESSAGE = r"RoPE \((longrope|dynamic)\) change with the length: those of {} tokens are not those of the {} that"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[Any]:
    with torch.no_grad():
        yield


def new(kind: Any) -> Any:
    family, changes = KINDS[kind]
    return build(family, **changes)


def message(other: Any, read: Any) -> Any:
    return MESSAGE.format(other, read)


@every_kind
@pytest.mark.parametrize("chunk_size", [None, 10, 47, 70])
def test_a_prompt_has_the_angles_of_its_length_whatever_chunks_it_is_read_in(kind: Any, chunk_size: Any) -> None:
    ours, ids = attach(new(kind)), tokens(1, 80)
    whole = DynamicCache()
    new(kind)(input_ids=ids, past_key_values=whole)
    cache = prefill(ours, ids, chunk_size=chunk_size)
    for layer, expected in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(layer.prompt.keys, expected.keys, rtol=0, atol=1e-4)


@every_kind
def test_what_was_read_before_does_not_matter(kind: Any) -> None:
    """transformers' dynamic RoPE remembers the longest text; two caches would rotate by each other's angles."""
    ours = attach(new(kind))
    prefill(ours, tokens(1, 120))
    long, short = prefill(ours, tokens(1, 60)), prefill(ours, tokens(1, 30))
    for cache, length in ((long, 60), (short, 30)):
        expected = prefill(attach(new(kind)), tokens(1, length))
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(layer.prompt.keys, other.prompt.keys)
    after = continuation(ours, tokens(1, 9), short)
    assert_logits_close(after, new(kind)(input_ids=torch.cat([tokens(1, 30), tokens(1, 9)], 1)).logits[:, 30:])


@pytest.mark.parametrize("name", [None, "snapkv", "expected_attention"])
def test_texts_beyond_the_switch_are_continued_with_its_angles(name: Any) -> None:
    ours, ids = attach(new("longrope")), tokens(1, 90)
    policies = [] if name is None else [load_policy(name)]
    caches = [prefill(ours, ids[:, :70], chunk_size=size, policies=policies) for size in (None, 20)]
    if policies:
        caches = [policies[0].compress(cache, keep=0.5) for cache in caches]
    got = [continuation(ours, ids[:, 70:], cache) for cache in caches]
    assert_logits_close(*got)
    if name is None:
        assert_logits_close(got[0], new("longrope")(input_ids=ids).logits[:, 70:])
    assert torch.equal(*(generate(ours, ids[:, :1], cache, max_new_tokens=8) for cache in caches))


@every_kind
@pytest.mark.parametrize("keep", [1, 0.5])
def test_a_continuation_across_the_switch_is_refused(kind: Any, keep: Any) -> None:
    ours, ids = attach(new(kind)), tokens(1, SWITCH + 12)
    cache = load_policy("snapkv").compress(prefill(ours, ids[:, :SWITCH]), keep=keep)
    with pytest.raises(UserError, match=message(SWITCH + 12, SWITCH)):
        continuation(ours, ids[:, SWITCH:], cache.fork())
    with pytest.raises(UserError, match=message(SWITCH + 1, SWITCH)):
        generate(ours, ids[:, SWITCH : SWITCH + 1], cache.fork(), max_new_tokens=3)
    with pytest.raises(UserError, match=message(SWITCH + 1, SWITCH - 4)):
        generate(ours, ids[:, :2], prefill(ours, ids[:, : SWITCH - 4]), max_new_tokens=6)
    with pytest.raises(UserError, match=message(SWITCH + 1, SWITCH - 4)):
        generate(ours, ids[:, :2], prefill(ours, ids[:, : SWITCH - 4]), max_new_tokens=6, num_beams=2)


@every_kind
def test_generate_of_transformers_is_refused_there_too(kind: Any) -> None:
    """Phi-3's own drops the cache at the switch, and with it what was evicted."""
    ours, ids = attach(new(kind)), tokens(1, SWITCH - 2)
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    cache = prefill(ours, ids[:, :-1])
    few = ours.generate(ids, past_key_values=cache.fork(), max_new_tokens=2, **settings)
    assert torch.equal(few, new(kind).generate(ids, max_new_tokens=2, **settings))
    for given in (cache, Policy(StreamingLLM()).compress(cache.fork(), keep=0.5), CompressedCache(ours.config)):
        with pytest.raises(UserError, match=r"change with the length|as its RoPE changes with the length"):
            ours.generate(ids, past_key_values=given, max_new_tokens=8, **settings)


@every_kind
def test_rows_on_both_sides_of_the_switch_are_refused(kind: Any) -> None:
    ours = attach(new(kind))
    with pytest.raises(UserError, match=message(30, 60)):
        prefill(ours, *padded([tokens(1, 60)[0], tokens(1, 30)[0]]))
    together = prefill(ours, *padded([tokens(1, 40)[0], tokens(1, 30)[0]]), chunk_size=11)
    alone = prefill(ours, tokens(1, 30))
    assert_logits_close(continuation(ours, tokens(2, 6), together)[1:], continuation(ours, tokens(2, 6)[1:], alone))


@every_kind
def test_a_prompt_of_one_token_does_not_cross_the_switch(kind: Any) -> None:
    """Its key has angle 0 whatever the length is; those after it have not."""
    ours, ids = attach(new(kind)), tokens(1, SWITCH + 6)
    cache = prefill(ours, ids[:, :1])
    logits = continuation(ours, ids[:, 1:SWITCH], cache)
    assert_logits_close(logits, new(kind)(input_ids=ids[:, :SWITCH]).logits[:, 1:])
    with pytest.raises(UserError, match=message(SWITCH + 6, 1)):
        continuation(ours, ids[:, SWITCH:], cache)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_padding_does_not_count_as_length(kind: Any) -> None:
    """Slots reach beyond the switch, tokens do not."""
    ours = attach(new(kind))
    ids, mask = padded([tokens(1, SWITCH - 12)[0], tokens(1, 20)[0]])
    short, short_mask = tokens(2, 10), torch.ones(2, 10)
    short_mask[0, 4:] = 0
    short_mask[1, :] = 1
    cache = prefill(ours, ids, mask)
    continuation(ours, short, cache, short_mask)
    logits = continuation(ours, tokens(2, 4), cache)
    alone = prefill(ours, ids[:1, :])
    continuation(ours, short[:1, :4], alone)
    assert_logits_close(logits[:1], continuation(ours, tokens(2, 4)[:1], alone))
    with pytest.raises(UserError, match="change with the length"):
        continuation(ours, tokens(2, 5), cache)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("generated", [False, True], ids=["reading tokens", "generating"])
def test_a_step_waits_for_nothing_but_the_models_own_embedding(
    kind: Any, generated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary cache has the waits of transformers' embedding, which looks at the positions by itself."""
    monkeypatch.setattr("learnkv.core.finite.READ_AT_ONCE", set())  # as on a GPU
    model, step = attach(new(kind)), tokens(1, 1)
    cache, plain_cache = prefill(model, tokens(1, 20)), DynamicCache()
    model(input_ids=tokens(1, 20), past_key_values=plain_cache)
    continuation(model, step, cache)  # a cache finds out once how far its angles reach

    def counted(turn: Any) -> Counts:
        with Meter() as counts:
            turn()
        return counts

    if generated:
        one, nine = (counted(lambda n=n: generate(model, step, cache.fork(), max_new_tokens=n)) for n in (2, 10))
        waits = nine.waits - one.waits
        passes = 8
    else:
        waits, passes = counted(lambda: continuation(model, step, cache)).waits, 1
    position = torch.full((1, 1), 20)
    own = counted(lambda: model(input_ids=step, position_ids=position, past_key_values=plain_cache)).waits
    assert waits == Counter({name: passes * times for name, times in own.items()})


def test_chunks_of_a_cache_that_is_filled_by_hand() -> None:
    ours, ids = attach(new("longrope")), tokens(1, 60)
    cache = CompressedCache(ours.config)
    ours(input_ids=ids[:, :40], past_key_values=cache)
    with pytest.raises(UserError, match=message(60, 40)):
        ours(input_ids=ids[:, 40:], past_key_values=cache)


def test_ordinary_caches_are_rotated_as_before() -> None:
    ours, theirs, ids = attach(new("dynamic")), new("dynamic"), tokens(1, 70)
    prefill(ours, ids)
    theirs(input_ids=ids)
    for length in (60, 70, 20):
        assert torch.equal(*(model(input_ids=ids[:, :length]).logits for model in (ours, theirs)))


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 3.0}, 192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            64,
        ),
    ],
)
def test_prompts_as_long_as_the_scaling_allows(rope: Any, context: Any) -> None:
    model = build("llama", max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})
    assert context_length(model) == context
    expected = build("llama", max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope})
    ids = tokens(1, context)
    cache = prefill(attach(model), ids[:, :-3], chunk_size=50)
    if rope["rope_type"] != "dynamic":
        assert_logits_close(continuation(model, ids[:, -3:], cache), expected(input_ids=ids).logits[:, -3:])
    with pytest.raises(UserError, match=rf"the model's context is {context}"):
        prefill(model, tokens(1, context + 1))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope", [YARN, LLAMA3])
def test_fixed_scalings_rotate_on_both_sides_of_the_original_length(rope: Any) -> None:
    """A prompt crosses it within a chunk; kept entries that are moved across it get the angles of their new places."""
    model = attach(build("llama", max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope}))
    ids, policy = tokens(1, 60), Policy(StreamingLLM(sinks=0), sinks=0, recent=0, rerotate="start")
    whole = prefill(model, ids, policies=[policy], chunk_size=25)
    moved, later = policy.compress(whole, keep=0.2).layers[0], prefill(model, ids[:, -12:]).layers[0]
    for head in range(2):
        begin = int(moved.segment.offset[head])
        keys = moved.segment.keys[begin : begin + 12]
        torch.testing.assert_close(keys, later.prompt.keys[0, head], rtol=0, atol=1e-4)


def test_untouched_models_have_no_moving_rope() -> None:
    for family in ("llama", "gemma3"):
        assert attach(build(family))._learnkv_embeddings == []
    assert plain("llama").config.rope_parameters["rope_type"] == "default"
