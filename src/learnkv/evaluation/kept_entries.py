"""What the sample viewer shows of a prompt: its tokens, and which of them every head of a policy kept."""

import base64
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.states import Kept
from learnkv.evaluation.stored_bits import stored_bits
from learnkv.evaluation.tasks.base import Prompt

VIEW = "view"
"""Key of a record with what the viewer shows."""
INCOMPLETE = "\ufffd"
LONGEST_CHARACTER = 8
"""Most tokens that one character is made of; what is not complete by then is no character."""


def viewed_prompts(prompts: Iterable[Prompt], count: int) -> frozenset[str]:
    """Digests of `count` prompts: the first of every task, length and setting, then the second of each, and so on."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.task, prompt.length, prompt.setting), []).append(prompt.digest)
    rounds = itertools.zip_longest(*groups.values())
    in_turn = (digest for digests in rounds for digest in digests if digest is not None)
    return frozenset(itertools.islice(in_turn, count))


def prompt_view(tokenizer: Any, prompt: Prompt) -> dict[str, Any]:
    """The texts of the tokens that were compressed, and of all that was read after them."""
    if tokenizer is None:
        return {"tokens": [f"[{token}]" for token in prompt.prefill_ids], "after": ""}
    after = tokenizer.decode(prompt.suffix_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"tokens": token_texts(tokenizer, prompt.prefill_ids), "after": after}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it.

    Where several tokens make one character, the last of them has it and the others have no text.
    """

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts: list[str] = []
    begin, known = 0, 0  # the last complete character, for spaces that depend on it, begins at the first of these
    for end in range(1, len(ids) + 1):
        before, text = decode(ids[begin:known]), decode(ids[begin:end])
        if text.endswith(INCOMPLETE) and end - known < LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(before) :])
        begin, known = known, end
    return texts


def kept_view(cache: CompressedCache, row: int) -> dict[str, Any]:
    """Which tokens of a row's prompt every head kept, and in how many bits where they are stored in fewer.

    Returns:
        `shape` [L, H, tokens], `kept` as `packed` makes it, `bits` [L, H] per stored number, scales included; None for
        a head without entries, or for all where every entry is stored as the model computed it.
    """
    cache.refuse_invalid()
    layers = cache.compressed_layers()
    kept = np.zeros((len(layers), layers[0].heads, cache.prompt_lengths[row]), dtype=bool)
    for number, layer in enumerate(layers):
        for head in range(layer.heads):
            kept[number, head, layer.kept_positions(row, head).cpu().numpy()] = True
    tiered = any(layer.state.tiers for layer in layers if isinstance(layer.state, Kept))
    return {
        "shape": list(kept.shape),
        "kept": packed(kept),
        "bits": [[bits or None for bits in heads] for heads in stored_bits(cache, row)["bits"]] if tiered else None,
    }


def packed(kept: np.ndarray) -> str:
    """Booleans as base64 of their deflated bits, the first in the highest bit of a byte."""
    return base64.b64encode(zlib.compress(np.packbits(kept.reshape(-1)).tobytes(), 9)).decode("ascii")


def unpacked(view: Mapping[str, Any]) -> np.ndarray:
    """Booleans [L, H, tokens] of a `kept_view`."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(view["kept"])), dtype=np.uint8)
    shape = tuple(view["shape"])
    return np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)
