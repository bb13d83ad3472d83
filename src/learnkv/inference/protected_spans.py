"""Which tokens of a prompt are protected: given spans, a chat's system message, tokens after anchors."""

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from learnkv.core.protection import Protection, Span
from learnkv.errors import UserError

Protect = str | Sequence[Span] | Sequence[Sequence[Span]] | Protection
_REPLACED = "\ufffd"  # of a token that holds a part of a character only
_LONGEST_CHARACTER = 4  # bytes, and so tokens
_BEGIN, _NEXT = "\ue000\ue001", "\ue002\ue003"  # private use characters: no text has them


@dataclass(frozen=True)
class Anchors:
    """Words after which tokens are protected, whatever their scores (Transactional Attention, arXiv 2604.11288).

    The paper names anchors such as "password:" and a budget for what follows them; that tokens are taken in the order
    of the prompt, and the default numbers, are this project's own.

    Args:
        words: as they stand in the text; upper and lower case differ.
        tokens: most tokens that are protected after an anchor.
        until: text that ends them, after the first character that is no space.
        share: most entries per head that are protected so, as a fraction of a row's budget: however often anchors are
            repeated, the rest stays for what the policy chooses.
    """

    words: Sequence[str]
    tokens: int = 16
    until: str = "\n"
    share: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.words, str) or not all(isinstance(word, str) and word for word in self.words):
            raise UserError(f"protect_after={self.words!r}: expected a list of words such as ['password:']")
        if self.tokens < 1 or not 0 < self.share <= 1:
            raise UserError(f"tokens={self.tokens} share={self.share:g}: expected at least 1 token and 0 < share <= 1")


def protection_of(
    rows: Sequence[Sequence[int]],
    protect: Protect | None,
    protect_after: Sequence[str] | Anchors | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Protection | None:
    """Protected spans of prompts; None where nothing is protected.

    Args:
        rows: token ids of every prompt, without padding.
        protect: spans (begin, end) of all prompts alike or a list of them for each, counted in tokens without padding;
            or `system`, the system message of a chat; or what an earlier call returned.
        protect_after: words after which tokens are protected.
        tokenizer: of roles and words.

    Raises:
        UserError: a span outside of its prompt, a prompt without a system message or a chat template that does not
            mark it, words without a tokenizer.
    """
    if isinstance(protect, Protection):
        if protect_after is not None or len(protect.spans) != len(rows):
            raise UserError(f"protect= of {len(protect.spans)} prompts: expected {len(rows)} and no protect_after=")
        return protect
    if protect is None and protect_after is None:
        return None
    if isinstance(protect, str) and protect != "system":
        raise UserError(f"protect={protect}: expected system, or spans (begin, end) of tokens")
    nothing: tuple[tuple[Span, ...], ...] = ((),) * len(rows)
    anchors = protect_after if protect_after is None or isinstance(protect_after, Anchors) else Anchors(protect_after)
    if isinstance(protect, str) or anchors is not None:
        if tokenizer is None:
            name = f"protect={protect}" if isinstance(protect, str) else f"protect_after={protect_after}"
            raise UserError(f"{name}: is looked for in the prompt's text, expected tokenizer=")
        texts = [TokenTexts.of(tokenizer, ids) for ids in rows]
    spans, after, share = nothing, nothing, 1.0
    if isinstance(protect, str):
        assert tokenizer is not None
        spans = _system_message(tokenizer, texts)
    elif protect is not None:
        spans = _given(protect, [len(ids) for ids in rows])
    if anchors is not None:
        after, share = tuple(_after(text, anchors) for text in texts), anchors.share
    return Protection(spans, after, share)


@dataclass(frozen=True)
class ProtectedSpans:
    """`protection_of` with its settings, for the prompts of many batches."""

    tokenizer: PreTrainedTokenizerBase
    protect_after: Sequence[str] | Anchors

    def __call__(self, rows: Sequence[Sequence[int]]) -> Protection | None:
        """Protected spans of prompts, as lists of token ids without padding."""
        return protection_of(rows, None, self.protect_after, self.tokenizer)


def unpadded(input_ids: Tensor, lengths: Sequence[int]) -> list[list[int]]:
    """Ids of every row of `input_ids` [B, S] without left padding (host sync)."""
    return [ids[len(ids) - length :] for ids, length in zip(input_ids.tolist(), lengths, strict=True)]


def _given(protect: Sequence[Any], lengths: Sequence[int]) -> tuple[tuple[Span, ...], ...]:
    """Spans as typed, for each row."""
    try:
        alike = all(len(span) and all(isinstance(bound, Integral) for bound in span) for span in protect)
        listed = [protect] * len(lengths) if alike else list(protect)
        rows = tuple(tuple((int(begin), int(end)) for begin, end in spans) for spans in listed)
    except (TypeError, ValueError):
        raise UserError(f"protect={protect!r}: expected spans (begin, end), or a list of them for each row") from None
    if len(rows) != len(lengths):
        raise UserError(f"protect= with spans of {len(rows)} rows: expected {len(lengths)}, one list for each")
    for row, (spans, length) in enumerate(zip(rows, lengths, strict=True)):
        for begin, end in spans:
            if not 0 <= begin < end <= length:
                raise UserError(f"protect: span ({begin}, {end}) of row {row}: expected 0 <= begin < end <= {length}")
    return rows


@dataclass(frozen=True)
class TokenTexts:
    """The text of a prompt, and where each of its tokens begins and ends in it."""

    text: str
    ends: Sequence[int]
    """Of every token; a part of a character that is no text of its own ends where it begins."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> "TokenTexts":
        """Decoded token by token, special tokens too; tokens of one character together."""
        pieces, parts = list[str](), list[int]()
        for token in ids:
            parts.append(token)
            text = _text_of(tokenizer, tuple(parts))
            if _REPLACED not in text or len(parts) == _LONGEST_CHARACTER:
                pieces += [""] * (len(parts) - 1) + [text]
                parts.clear()
        pieces += [""] * len(parts)
        return cls("".join(pieces), list(accumulate(map(len, pieces))))

    def span(self, begin: int, end: int) -> Span:
        """Tokens of the characters from `begin` to `end`."""
        first = bisect_right(self.ends, begin)
        while first > 0 and self.ends[first - 1] == (self.ends[first - 2] if first > 1 else 0):
            first -= 1  # parts of the character whose text the last of them has
        return first, min(bisect_left(self.ends, end), len(self.ends) - 1) + 1


_LEAD = "a"


@functools.lru_cache(maxsize=1 << 16)
def _text_of(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """Text of tokens within a text: some decoders drop the space in front of the first token."""
    lead = tokenizer(_LEAD, add_special_tokens=False)["input_ids"]
    settings = {"clean_up_tokenization_spaces": False, "skip_special_tokens": False}
    before, whole = (str(tokenizer.decode(part, **settings)) for part in (lead, [*lead, *ids]))
    return whole.removeprefix(before)


def _system_message(tokenizer: PreTrainedTokenizerBase, texts: Sequence[TokenTexts]) -> tuple[tuple[Span, ...], ...]:
    """The system message of every row, from its header to the header of the next message."""
    header, footer = _system_marks(tokenizer)
    spans = list[tuple[Span, ...]]()
    for row, of_row in enumerate(texts):
        if (begin := of_row.text.find(header)) < 0:
            raise UserError(
                f"protect=system: row {row} has no system message, which begins with {header!r} in the chat template"
            )
        end = of_row.text.find(footer, begin + len(header))
        spans.append((of_row.span(begin, len(of_row.text) if end < 0 else end),))
    return tuple(spans)


def _system_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Text before the content of a system message, and after it up to a user's, in the tokenizer's chat template.

    Raises:
        UserError: no chat template, or one that does not mark system messages.
    """
    if tokenizer.chat_template is None:
        raise UserError("protect=system: the tokenizer has no chat template; name spans instead")
    messages = [{"role": "system", "content": _BEGIN}, {"role": "user", "content": _NEXT}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # jinja2's, raised by the template itself
        if type(error).__name__ != "TemplateError":
            raise
        raise UserError(f"protect=system: the chat template refuses system messages ({error})") from None
    head, _, rest = rendered.partition(_BEGIN)
    header, footer = head.removeprefix(str(tokenizer.bos_token or "")).lstrip(), rest.partition(_NEXT)[0].strip()
    if _NEXT not in rest or not header.strip() or not footer:
        raise UserError(
            "protect=system: the chat template does not mark where a system message begins and ends; name spans instead"
        )
    return header, footer


def _after(text: TokenTexts, anchors: Anchors) -> tuple[Span, ...]:
    """Tokens after every occurrence of an anchor, in the order of the text."""
    places = sorted({end for word in anchors.words for end in _ends_of(word, text.text)})
    spans = list[Span]()
    for place in places:
        value = next((index for index in range(place, len(text.text)) if not text.text[index].isspace()), place)
        end = text.text.find(anchors.until, value) if anchors.until else -1
        end = len(text.text) if end < 0 else end
        if end > place:
            first, last = text.span(place, end)
            spans.append((first, min(last, first + anchors.tokens)))
    return tuple(spans)


def _ends_of(word: str, text: str) -> Iterator[int]:
    """Where the occurrences of a word end."""
    begin = text.find(word)
    while begin >= 0:
        yield begin + len(word)
        begin = text.find(word, begin + 1)
