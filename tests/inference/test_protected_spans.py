"""Spans of tokens found in a prompt's text: system messages of a chat template, tokens after anchors."""

import pytest
import torch
from support.models import attached, padded, tokens

from learnkv import load_model, prefill
from learnkv.errors import UserError
from learnkv.inference.protected_spans import Anchors, ProtectedSpans, TokenTexts, protection_of

CHATML = "{{ bos_token }}{% for part in messages %}<|start|>{{ part.role }}\n{{ part.content }}<|end|>\n{% endfor %}"
MERGED = "{{ bos_token }}{% for message in messages %}{{ message.content | trim }}\n\n{% endfor %}"
REFUSING = "{{ raise_exception('System role not supported') }}"


@pytest.fixture
def tokenizer():  # type: ignore[no-untyped-def]
    return load_model("reference")[1]


def chat(tokenizer, system: str, user: str) -> list[int]:  # type: ignore[no-untyped-def]
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", ["Rain  fell.\n\tFog", "Ümlaut – 日本語 and 🙂🙂.", "", "a", " a"])
def test_texts_of_tokens(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = TokenTexts.of(tokenizer, ids)
    assert texts.text == text
    assert len(texts.ends) == len(ids)
    for begin in range(len(text)):
        first, last = texts.span(begin, begin + 1)
        assert text[begin] in tokenizer.decode(ids[first:last])
        assert last - first <= 4  # bytes of a character


@pytest.mark.parametrize("system", ["Be brief.", "Ümlaut – 日本語\nonly.", "Say <|start|>user at most twice."])
def test_a_system_message(tokenizer, system: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer.chat_template = CHATML
    rows = [chat(tokenizer, system, "Rain."), chat(tokenizer, "Short.", "<|start|>system\nNot this<|end|>\n")]
    protection = protection_of(rows, "system", None, tokenizer)
    assert protection is not None
    for ids, spans, content in zip(rows, protection.spans, [system, "Short."], strict=True):
        ((begin, end),) = spans
        assert tokenizer.decode(ids[begin:end]) == f"<|start|>system\n{content}"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (None, "has no chat template"),
        (MERGED, "does not mark where a system message begins and ends"),
        (REFUSING, "refuses system messages"),
        (CHATML, "row 0 has no system message"),
    ],
)
def test_a_system_message_that_is_not_there(tokenizer, template: str | None, error: str) -> None:  # type: ignore[no-untyped-def]
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"protect=system: .*{error}"):
        protection_of([tokenizer("Rain fell.").input_ids], "system", None, tokenizer)


def test_tokens_after_anchors(tokenizer) -> None:  # type: ignore[no-untyped-def]
    text = "My password: 4817 x.\nkey:\n  99, and more of it\nNo passwords: here\npassword:"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    after = ProtectedSpans(tokenizer, ["password:", "key:"])([ids])
    assert after is not None
    assert [tokenizer.decode(ids[begin:end]) for begin, end in after.after_anchors[0]] == [
        " 4817 x.",
        "\n  99, and more of it",
    ]
    assert after.spans == ((),)
    few = protection_of([ids], None, Anchors(["password:"], tokens=2, share=0.1), tokenizer)
    assert few is not None
    assert few.share == 0.1
    assert few.after_anchors == ((((begin := after.after_anchors[0][0][0]), begin + 2),),)
    on = protection_of([ids], None, Anchors(["key:"], tokens=99, until=""), tokenizer)
    assert on is not None
    assert on.after_anchors[0][0][1] == len(ids)


def test_spans_are_positions_without_padding() -> None:
    ids, mask = padded([tokens(1, 20)[0], tokens(1, 30)[0]])
    model = attached("llama")
    alike = prefill(model, ids, mask, protect=[(2, 5)]).protection
    assert alike is not None
    assert alike.spans == (((2, 5),), ((2, 5),))
    assert prefill(model, ids, mask, protect=[[], [(0, 30)]]).protection.spans == ((), ((0, 30),))
    assert prefill(model, ids, mask, protect=[]).protection.spans == ((), ())
    assert prefill(model, ids, mask, protect=alike).protection is alike
    assert prefill(model, ids, mask).protection is None
    with pytest.raises(UserError, match=r"span \(2, 25\) of row 0: expected 0 <= begin < end <= 20"):
        prefill(model, ids, mask, protect=[(2, 25)])


@pytest.mark.parametrize(
    ("protect", "after", "error"),
    [
        ([(3, 3)], None, r"span \(3, 3\) of row 0: expected 0 <= begin < end <= 9"),
        ([(-1, 3)], None, "expected 0 <= begin < end <= 9"),
        ([[(1, 2)], [(1, 2)]], None, "spans of 2 rows: expected 1"),
        ([(1, 2, 3)], None, "expected spans"),
        (5, None, "protect=5: expected spans"),
        ([(1.5, 2)], None, "expected spans"),
        ("user", None, "protect=user: expected system, or spans"),
        ("system", None, "protect=system: is looked for in the prompt's text, expected tokenizer="),
        (None, ["password:"], "expected tokenizer="),
        (None, "password:", "protect_after='password:': expected a list of words"),
        (None, [""], "expected a list of words"),
    ],
)
def test_mistakes_are_named(protect: object, after: object, error: str) -> None:
    with pytest.raises(UserError, match=error):
        prefill(attached("llama"), torch.ones(1, 9, dtype=torch.long), protect=protect, protect_after=after)  # type: ignore[arg-type]


def test_numbers_of_anchors() -> None:
    with pytest.raises(UserError, match=r"tokens=0 share=0.5"):
        Anchors(["a"], tokens=0)
    with pytest.raises(UserError, match=r"tokens=16 share=1.5"):
        Anchors(["a"], share=1.5)
