"""A cache that was saved and loaded is the cache that was saved: every state, every family, forks and later turns."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.configs import FAMILIES, HYBRIDS, STATES
from support.models import attached, build, padded, tokens
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, generate, load_cache, prefill, save_cache
from learnkv.codecs import KIVIKeys, KIVIValues
from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.pages import Quest
from learnkv.precision import RateDistortion, UniformPrecision
from learnkv.scorers import H2O, ExpectedAttention, SnapKV

A_FEW_KB = 20_000
SNAPKV = Policy(SnapKV(window=8))


def prompt() -> tuple[Tensor, Tensor]:
    """Two rows, the first left-padded."""
    return padded([tokens(1, 50)[0], tokens(1, 70, seed=1)[0]])


def policies() -> dict[str, tuple[Policy, dict[str, float]]]:
    scorer = SnapKV(window=8)
    group = {"bits": 2, "group": 8, "residual": 16}
    kivi = UniformPrecision(KIVIKeys(**group), KIVIValues(**group))
    return {
        "evicted": (Policy(scorer), {"keep": 0.3}),
        "rotated": (Policy(scorer, rerotate="end"), {"keep": 0.3}),
        "K4V3": (Policy(scorer, precision={"keys": 4, "values": 3}), {"keep": 0.4}),
        "16 bits": (Policy(scorer, precision=16), {"keep": 0.4}),
        "shared bytes": (Policy(scorer, precision=RateDistortion()), {"bytes": 0.2}),
        "kivi": (Policy(None, precision=kivi), {"keep": 1.0}),
        "pages": (Policy(None, pages=Quest(page_size=4, dense_layers=1)), {"keep": 0.3}),
        "evicted pages": (Policy(scorer, pages=Quest(page_size=4, dense_layers=0), read=0.5), {"keep": 0.5}),
        "complete": (Policy(scorer), {"keep": 1.0}),
    }


def assert_same(cache: CompressedCache, loaded: CompressedCache, family: str = "llama") -> None:
    """Equal entries, and equal logits of questions of equal and of different lengths."""
    assert loaded.spent == cache.spent
    assert loaded.full_nbytes == cache.full_nbytes
    assert loaded.lengths == cache.lengths
    for layer_idx in cache.compressible:
        for row in range(2):
            kept = [part.kept_positions(layer_idx, row, 0) for part in (cache, loaded)]
            assert torch.equal(*kept)
    model, questions = attached(family), [(tokens(2, 4), None), (tokens(2, 1, seed=3), None)]
    if family not in (*HYBRIDS, *STATES):  # whose other layers take questions of one length only
        questions.insert(1, padded([tokens(1, 3)[0], tokens(1, 5, seed=2)[0]], side="right"))
    for question, of_tokens in questions:
        logits = [continuation(model, question, part, of_tokens) for part in (cache, loaded)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral-window"])
def test_every_family(family: str, tmp_path: Path) -> None:
    small = SNAPKV.compress(prefill(attached(family), *prompt(), policies=[SNAPKV]), keep=0.3)
    continuation(attached(family), tokens(2, 3, seed=5), small)
    assert_same(small, load_cache(save_cache(small, tmp_path / "cache"), attached(family)), family)


@pytest.mark.parametrize("name", policies())
def test_every_state(name: str, tmp_path: Path) -> None:
    policy, spent = policies()[name]
    small = policy.compress(prefill(attached("llama"), *prompt(), policies=[policy]), **spent)
    folder = save_cache(small, tmp_path / "cache")
    loaded = load_cache(folder, attached("llama"))
    if "pages" not in name and name != "complete":
        assert loaded.nbytes == small.nbytes
        assert loaded.row_nbytes() == small.row_nbytes()
        assert small.nbytes <= sum(file.stat().st_size for file in folder.iterdir()) < small.nbytes + A_FEW_KB
    expected = {"policy": policy.spec(), **spent}
    assert loaded.compression == (None if name == "complete" else expected)
    assert [layer.attended_entries().tolist() for layer in loaded.compressed_layers()] == [
        layer.attended_entries().tolist() for layer in small.compressed_layers()
    ]
    assert_same(small.fork(), loaded.fork())
    rows = torch.tensor([1, 0, 1])
    for part in (small, loaded):
        part.batch_select_indices(rows)
    question = tokens(3, 2)
    logits = [continuation(attached("llama"), question, part) for part in (small, loaded)]
    assert torch.equal(*logits)


def test_selected_rows_are_stored_as_they_share_entries(tmp_path: Path) -> None:
    small = SNAPKV.compress(prefill(attached("llama"), *prompt(), policies=[SNAPKV]), keep=0.3)
    small.batch_select_indices(torch.tensor([1, 0, 1]))
    loaded = load_cache(save_cache(small, tmp_path), attached("llama"))
    assert loaded.nbytes == small.nbytes
    question = tokens(3, 2)
    assert torch.equal(*(continuation(attached("llama"), question, part) for part in (small, loaded)))


def test_turns_go_on_in_a_loaded_cache(tmp_path: Path) -> None:
    model = attached("llama")
    cache = SNAPKV.compress(prefill(model, *prompt(), policies=[SNAPKV]), keep=0.4)
    generate(model, tokens(2, 4), cache, max_new_tokens=6, eos_token_id=5, pad_token_id=0)
    assert cache.pending is not None
    loaded = load_cache(save_cache(cache, tmp_path), model)
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.5}  # which counts the tokens of the prompt and both turns
    turns = [generate(model, tokens(2, 3, seed=4), part, **settings) for part in (cache, loaded)]
    assert torch.equal(*turns)
    again = load_cache(save_cache(loaded, tmp_path), model)
    assert torch.equal(*(generate(model, tokens(2, 3), part, max_new_tokens=4) for part in (cache, again)))


def test_a_complete_prompt_is_compressed_later(tmp_path: Path) -> None:
    model = attached("qwen3")
    cache = prefill(model, *prompt(), policies=[SNAPKV])
    loaded = load_cache(save_cache(cache, tmp_path), model)
    small, later = (SNAPKV.compress(part.fork(), keep=0.3) for part in (cache, loaded))
    assert torch.equal(*(continuation(model, tokens(2, 3), part) for part in (small, later)))
    assert torch.equal(*(continuation(model, tokens(2, 3), part) for part in (cache, loaded)))


@pytest.mark.parametrize("scorer", [H2O(), ExpectedAttention()])
def test_what_a_stored_prompt_lacks_is_refused(scorer: H2O | ExpectedAttention, tmp_path: Path) -> None:
    policy = Policy(scorer)
    cache = prefill(attached("llama"), *prompt(), policies=[policy])
    loaded = load_cache(save_cache(cache, tmp_path), attached("llama"))
    with pytest.raises(UserError, match=f"policy's {type(scorer).__name__} (reads more|applies functions)"):
        policy.compress(loaded, keep=0.3)


def test_an_adapter_is_stored_with_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = build("llama")
    weights = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(2, 48),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.randn(64, 2),
    }
    policy = Policy(SnapKV(window=8))
    policy.adapter = Adapter(2, 4.0, ("model.layers.0.self_attn.q_proj",), weights)
    small = policy.compress(prefill(model, *prompt(), policies=[policy]), keep=0.3)
    loaded = load_cache(save_cache(small, tmp_path), model)
    assert loaded.adapter is not None
    assert loaded.adapter.name == policy.adapter.name
    without = SNAPKV.compress(prefill(model, *prompt(), policies=[SNAPKV]), keep=0.3)
    logits = [continuation(model, tokens(2, 3), part) for part in (small, loaded, without)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_angles_that_depend_on_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=40)
    cache = SNAPKV.compress(prefill(model, tokens(1, 70), policies=[SNAPKV]), keep=0.3)
    loaded = load_cache(save_cache(cache, tmp_path), model)
    with pytest.raises(UserError, match="change with the length"):
        continuation(model, tokens(1, 1), loaded.fork())
    with pytest.raises(UserError, match="change with the length"):
        continuation(model, tokens(1, 1), cache.fork())


def test_the_file_is_mapped_and_stays_as_it_is(tmp_path: Path) -> None:
    small = SNAPKV.compress(prefill(attached("llama"), *prompt(), policies=[SNAPKV]), keep=0.3)
    folder = save_cache(small, tmp_path)
    (file,) = folder.glob("*.safetensors")
    before = file.read_bytes()
    first, second = (load_cache(folder, attached("llama")) for _ in range(2))
    assert str(file.resolve()) in Path("/proc/self/maps").read_text()
    pool = first.compressed_layers()[0].segment
    assert pool is not None
    pool.keys.zero_()
    assert file.read_bytes() == before
    assert_same(small, second)
    with safe_open(file, "pt") as stored:
        assert len(list(stored.keys())) < 12


def test_a_thousand_loads_do_not_leak(tmp_path: Path) -> None:
    small = SNAPKV.compress(prefill(attached("qwen2"), tokens(1, 200), policies=[SNAPKV]), keep=0.9)
    folder = save_cache(small, tmp_path)
    for _ in range(50):
        load_cache(folder, attached("qwen2"))
    before = _resident()
    for _ in range(1000):
        load_cache(folder, attached("qwen2"))
    assert _resident() - before < 8 * 2**20
    assert str(folder) not in Path("/proc/self/maps").read_text()


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
