"""Keys that are rotated to consecutive positions when entries are evicted."""

from collections.abc import Iterator

import pytest
import torch
from support.models import attached, padded, policy_for, tokens
from torch import Tensor
from transformers import PreTrainedModel

from learnkv import Policy, continuation, generate, prefill
from learnkv.allocators import AdaKV
from learnkv.errors import UserError
from learnkv.scorers import Knorm, SnapKV, StreamingLLM

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def turned(model: PreTrainedModel, keys: Tensor, by: Tensor) -> Tensor:
    """Keys [K, D] rotated on by so many positions [K], in float64, with the angles of the model's configuration."""
    dim = keys.shape[-1]
    rope = model.config.rope_parameters
    assert rope["rope_type"] == "default"
    angle = by.unsqueeze(-1) * rope["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    first, second = keys.double().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.mark.parametrize("rerotate", ["start", "end"])
@pytest.mark.parametrize("one_shot", [False, True])
def test_keys_stand_side_by_side(rerotate: str, one_shot: bool) -> None:
    model, lengths = attached("llama"), (60, 33)
    prompt = padded([tokens(1, length)[0] for length in lengths])
    policy = Policy(SnapKV(), None if one_shot else AdaKV(), rerotate=rerotate)
    assert policy.reads_once == one_shot
    dense, cache = prefill(model, *prompt, policies=[policy]), prefill(model, *prompt, policy=policy, keep=0.3)
    for before, after in zip(dense.compressed_layers(), cache.compressed_layers(), strict=True):
        for row, length in enumerate(lengths):
            for head in range(2):
                kept = after.kept_positions(row, head)
                count, begin = len(kept), int(after.segment.offset[2 * row + head])
                first = 0 if rerotate == "start" else length - count
                target = torch.arange(first, first + count)
                assert after.segment.rotated[begin : begin + count].tolist() == target.tolist()
                held = before.prompt.keys[row, head, 60 - length :][kept]
                ours = after.segment.keys[begin : begin + count].double()
                torch.testing.assert_close(ours, turned(model, held, target - kept), rtol=0, atol=2e-5)


def test_a_prompt_whose_end_is_kept_looks_shorter() -> None:
    """The latest entries alone, rotated from position 0 on, are in the first layer what a short prompt gives."""
    model, ids = attached("llama"), tokens(1, 50)
    cache = prefill(model, ids, policy=Policy(StreamingLLM(sinks=0), sinks=0, rerotate="start"), keep=0.4)
    short = prefill(model, ids[:, 30:])
    ours = cache.compressed_layers()[0].segment.keys.view(2, 20, -1)[:2]
    torch.testing.assert_close(ours, short.compressed_layers()[0].prompt.keys[0], rtol=0, atol=2e-5)


def test_distances_stay_within_the_budget_while_tokens_are_added() -> None:
    """As in the original of StreamingLLM: what is held stands right before the next token, for ever."""
    model, every = attached("llama"), 4
    policy = Policy(StreamingLLM(sinks=2), sinks=0, recent=0, evict_interval=every, rerotate="end")
    plain = Policy(StreamingLLM(sinks=2), sinks=0, recent=0, evict_interval=every)
    cache, usual = (prefill(model, tokens(2, 40), policy=one, budget=10) for one in (policy, plain))
    for step in range(11):
        for one in (cache, usual):
            continuation(model, tokens(2, 2, seed=step), one)
    layer, straight = cache.compressed_layers()[0], usual.compressed_layers()[0]
    assert cache.tail_length == usual.tail_length == 2
    assert layer.kept_positions(1, 1).tolist() == straight.kept_positions(1, 1).tolist() == [0, 1, *range(52, 60)]
    assert layer.segment.rotated.view(-1, 10).tolist() == [list(range(50, 60))] * (layer.segment.rotated.numel() // 10)
    shift = torch.tensor([50, 50] + 8 * [0])  # in the first layer keys do not depend on what was attended to
    for row in range(4):
        begin, other = int(layer.segment.offset[row]), int(straight.segment.offset[row])
        ours, theirs = layer.segment.keys[begin : begin + 10], straight.segment.keys[other : other + 10]
        torch.testing.assert_close(ours.double(), turned(model, theirs, shift), rtol=0, atol=5e-5)
    assert generate(model, tokens(2, 1), cache, max_new_tokens=6).shape == (2, 6)


def test_rotated_rows_can_be_repeated() -> None:
    model, policy = attached("llama"), Policy(Knorm(), evict_interval=3, rerotate="end")
    cache = prefill(model, tokens(2, 40), policy=policy, keep=0.3)
    fork = cache.fork()
    fork.batch_select_indices(torch.tensor([1, 0, 1]))
    said = tokens(2, 7, seed=1)
    ours = torch.cat([continuation(model, one, fork) for one in said[[1, 0, 1]].split(1, 1)], 1)
    theirs = torch.cat([continuation(model, one, cache) for one in said.split(1, 1)], 1)
    torch.testing.assert_close(ours, theirs[[1, 0, 1]], rtol=0, atol=2e-4)


def test_training_and_learned_parts_leave_keys_in_place() -> None:
    policy = policy_for("budgets", attached("llama"))
    rotating = Policy(policy.scorer, policy.allocator, rerotate="end")
    whole = prefill(attached("llama"), tokens(1, 40))
    with pytest.raises(UserError, match=r"rerotate=end: expected none in training"):
        rotating.relax(whole, keep=0.5)
    assert rotating.compress(whole, keep=0.5).spent == [0.5]
