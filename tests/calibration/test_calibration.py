"""Tables measured of the reference model, each against what it claims to measure."""

import copy
from pathlib import Path

import pytest
import torch
from support.commands import calibrate
from support.models import Loaded

from learnkv import continuation, load_model, load_policy, prefill
from learnkv.allocators import Uniform
from learnkv.calibration.answering import answer_observations, attention
from learnkv.calibration.curve import curve_of
from learnkv.calibration.gates import head_gates
from learnkv.calibration.heads import head_scores, word_f1
from learnkv.calibration.layers import _output, layer_errors
from learnkv.calibration.trials import Trial, sample_trials
from learnkv.errors import RunError
from learnkv.formats import duo, headkv, layers, lukv
from learnkv.formats.files import TABLES
from learnkv.policy.policy import Policy
from learnkv.scorers import SnapKV


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model("reference")


@pytest.fixture(scope="module")
def trials(loaded: Loaded) -> list[Trial]:
    return list(sample_trials(loaded[1], 192, 4, seed=3))


def test_a_needle_is_the_sentence_that_holds_the_answer(loaded: Loaded, trials: list[Trial]) -> None:
    tokenizer = loaded[1]
    for trial in trials:
        first, last = trial.needle
        sentence = tokenizer.decode(trial.context[0, first:last]).strip(". ")
        asked = tokenizer.decode(trial.question[0])
        assert asked.strip().endswith(sentence.split(trial.text.strip(" ."))[0].strip())
        assert sentence.endswith(trial.text.strip(" ."))
        assert trial.context.shape[1] <= 192
    again = list(sample_trials(tokenizer, 192, 4, seed=3))
    assert all(torch.equal(one.context, other.context) for one, other in zip(trials, again, strict=True))


def test_a_chat_model_begins_its_answer_with_the_words_before_the_value(
    loaded: Loaded,
) -> None:
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = "{% for one in messages %}<u>{{ one.content }}</u>{% endfor %}<a>"
    plain, chat = (next(sample_trials(one, 192, 1, seed=3)) for one in (loaded[1], tokenizer))
    asked = tokenizer.decode(chat.question[0])
    before, _, begun = asked.partition("</u><a>")
    assert begun
    assert tokenizer.decode(plain.question[0]).endswith(begun)
    assert not before.endswith(begun)
    sentences = [
        loaded[1].decode(trial.context[0, trial.needle[0] : trial.needle[1]]).strip(". ") for trial in (plain, chat)
    ]
    assert sentences[0] == sentences[1]


def test_attention_while_answering_is_the_model_s_own(loaded: Loaded, trials: list[Trial]) -> None:
    model, trial = loaded[0], trials[0]
    before = torch.cat([trial.context, trial.question], 1)
    shown: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda module, given, made: shown.append(made[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=torch.cat([before, trial.answer[:, :-1]], 1))
        whole = [made[-trial.answer.shape[1] :] for made in shown]
        cache = Policy(SnapKV(window=8)).compress(prefill(model, trial.context), keep=0.2)
        shown.clear()
        continuation(model, torch.cat([trial.question, trial.answer[:, :-1]], 1), cache)
    for hook in hooks:
        hook.remove()
    for layer, seen in enumerate(answer_observations(model, before, trial.answer)):
        torch.testing.assert_close(_output(seen, None), whole[layer], rtol=1e-4, atol=1e-4)
        if layer == 0:  # further up, compression has changed what layers read
            kept = torch.ones_like(seen.valid)
            kept[..., : trial.context.shape[1]] = False
            for head in range(kept.shape[1]):
                kept[0, head, cache.kept_positions(0, 0, head)] = True
            assert (attention(seen, kept)[~kept[0, :, None, None].expand(-1, 2, trial.answer.shape[1], -1)] == 0).all()
            torch.testing.assert_close(_output(seen, kept), shown[0][-trial.answer.shape[1] :], rtol=1e-4, atol=1e-4)


def test_layer_errors_are_shares_and_grow_where_entries_are_missed(loaded: Loaded, trials: list[Trial]) -> None:
    model = loaded[0]
    errors = layer_errors(model, trials, Policy(SnapKV(window=8), Uniform()), keep=0.1)
    assert errors.shape == (6,)
    assert errors.sum() == pytest.approx(1)
    assert errors[4:].sum() > 0.5  # where the retrieval heads are


def test_retrieval_heads_are_found_where_the_model_has_them(loaded: Loaded, trials: list[Trial]) -> None:
    scores = head_scores(*loaded, trials, ["reasoning", "copying", "semantic"])
    means = {kind: headkv.mean_scores(found) for kind, found in scores.items()}
    assert {tuple(one.shape) for one in means.values()} == {(6, 8)}
    for mean in means.values():  # the reference model retrieves in its upper two layers of six
        assert mean[4:].max() > 3 * mean[:4].max()
    assert means["copying"].max() <= 1


def test_a_model_that_answers_nothing_is_told(loaded: Loaded, trials: list[Trial]) -> None:
    trial = type(trials[0])(**{**vars(trials[0]), "text": " something else"})
    with pytest.raises(RunError, match="answered none of 1 trials"):
        head_scores(*loaded, [trial], ["reasoning"])


def test_overlap_is_the_f1_of_words() -> None:
    assert word_f1(" 4817293.", " 4817293.") == 1
    assert word_f1("Ada, Bob and Cy", "ada bob") == pytest.approx(2 * 2 / 6)
    assert word_f1("", " 1.") == 0


def test_a_curve_keeps_the_most_useful_percents() -> None:
    """Head 0 has all its use in its first half; in head 1 what comes late is worth more than the start."""
    gains = torch.zeros(1, 2, 100)
    gains[0, 0, :50] = 3.0
    gains[0, 1, :50], gains[0, 1, 50:] = 1.0, 2.0
    curve = curve_of(gains)
    assert curve.shape == (99, 1, 2)
    torch.testing.assert_close(curve.mean((1, 2)), torch.arange(1, 100) / 100)
    torch.testing.assert_close(curve[74, 0], torch.tensor([0.5, 1.0]))  # 75 % evicted: head 0's good half is left
    torch.testing.assert_close(curve[24, 0], torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(curve[49, 0], torch.tensor([0.5, 0.5]))


def test_gates_start_at_one_where_only_the_penalty_moves_them(loaded: Loaded, trials: list[Trial]) -> None:
    model = loaded[0]
    torch.testing.assert_close(head_gates(model, trials, 4, 12, 1, penalty=1.0), torch.full((6, 4), 0.95))


def test_shipped_tables_fit_the_reference_model_and_agree_on_its_heads() -> None:
    scores = headkv.mean_scores(headkv.read(TABLES / "head_scores.json"))
    pattern, curve = duo.read(TABLES / "duo"), lukv.read(TABLES / "lukv.npy")
    assert (scores.shape, pattern.gates.shape, curve.shape) == ((6, 8), (6, 4), (99, 6, 4))
    assert layers.read(TABLES / "layer_errors.json").sum() == pytest.approx(1, abs=1e-4)
    of_groups = scores.unflatten(1, (4, 2)).mean(-1).flatten()
    assert set(of_groups.topk(3).indices.tolist()) == set(pattern.gates.flatten().topk(3).indices.tolist())
    best = set(of_groups.topk(4).indices.tolist())
    assert len(best & set(curve[89].flatten().topk(8, largest=False).indices.tolist())) >= 2


@pytest.mark.parametrize("name", ["headkv", "lukv", "duo_attention"])
def test_tables_of_the_reference_model_are_read_from_its_yaml(loaded: Loaded, trials: list[Trial], name: str) -> None:
    policy = load_policy(name)
    cache = prefill(loaded[0], trials[0].context, policies=[policy])
    small = policy.compress(cache, keep=0.25)
    assert small.spent == [pytest.approx(0.25, abs=1e-3)]
    assert small.budgets.unique().numel() > 1


def test_what_is_asked_for_is_written_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"out={tmp_path}/deep", "only=copying_heads", "lengths=192", "samples=2", "seed=3"]
    assert calibrate(words) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "deep" / "copying_heads.json")]
    scores = headkv.read(tmp_path / "deep" / "copying_heads.json")
    assert (len(scores), len(scores[0])) == (6, 8)
    for words, complaint in (
        (["only=copying_heads"], "out="),
        (["out=x", "lengths="], "lengths"),
        (["out=x", "only=all"], "only"),
    ):
        assert calibrate(words) == 2
        assert complaint in capsys.readouterr().err
