"""Where sentences, lines and paragraphs end, by the texts of a tokeniser's vocabulary."""

from typing import Any

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
"""Latin full stop, exclamation and question mark, and the full-width ones of Chinese and Japanese."""


def text_units(tokenizer: Any) -> dict[str, list[int]]:
    """Ids of the tokens that end a `sentence`, a `line` or, by a blank line in one token, a `paragraph`.

    A line ends with a line break in the token, a sentence with one or with a full stop, question or exclamation mark.
    """
    ends: dict[str, list[int]] = {"sentence": [], "line": [], "paragraph": []}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if "\n" in text or text.rstrip().endswith(SENTENCE_ENDS):
            ends["sentence"].append(token)
        if "\n" in text:
            ends["line"].append(token)
        if "\n\n" in text:
            ends["paragraph"].append(token)
    return ends
