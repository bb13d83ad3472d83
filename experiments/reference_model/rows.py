"""Training rows of the reference model: text, repetition and retrieval, as token ids with the labels that count.

A row is `(ids, labels)`, two integer arrays of exactly `length` tokens; labels are -100 where nothing is asked.
The haystack is the training text, never the help topics that evaluation hides its needles in.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from experiments.reference_model.questions import Ask, Asker, Difficulty, Ids
from learnkv.data import words
from learnkv.data.haystack import NOISE
from learnkv.data.retrieval_text import SPAN_QUESTIONS
from learnkv.errors import UserError

IGNORE = -100
READ = ("text", "repeat", "span")
ASKED = ("single", "dense", "multivalue", "multiquery", "chain", "lists", "mixed")


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Args:
        steps: optimizer steps of this stage.
        lengths: row length in tokens -> weight; every step draws one and fills `tokens_per_step` with such rows.
        kinds: kind of row (of `READ` and `ASKED`) -> weight.
        level: how hard its questions are.
        rate: factor on the learning rate.
    """

    steps: int
    lengths: dict[int, float]
    kinds: dict[str, float]
    level: Difficulty = field(default_factory=Difficulty)
    rate: float = 1.0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kinds) - {*READ, *ASKED}):
            raise UserError(f"kinds={', '.join(unknown)}: expected some of {', '.join(READ + ASKED)}")


class RowMaker:
    """Makes rows from tokenised text.

    Args:
        tokenizer: the reference model's tokenizer.
        pools: token ids of the training text, flat arrays; three passages in ten come from the last one.
        level: how hard the questions are.
        rng: where every random choice comes from.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, pools: list[np.ndarray], level: Difficulty, rng: random.Random
    ):
        self.pools, self.level, self.rng = pools, level, rng
        backend = tokenizer.backend_tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.starts_word = _starts_word(tokenizer)
        self.vocab_size = len(tokenizer)
        self.encode = lambda text: backend.encode(text, add_special_tokens=False).ids

    def row(self, kind: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A row of `kind` and exactly `length` tokens, the first one the beginning-of-text token."""
        if kind in READ:
            ids, labels = getattr(self, kind)(length - 1)
        else:
            ids, labels = self._hide(self._ask(kind, length - 1), length - 1)
        assert len(ids) == len(labels) == length - 1, f"{kind}: {len(ids)} tokens instead of {length - 1}"
        return np.array([self.bos, *ids]), np.array([IGNORE, *labels])

    def text(self, length: int) -> tuple[Ids, Ids]:
        """Plain text, all of it to be predicted."""
        ids = self._passage(length)
        return ids, ids

    def repeat(self, length: int) -> tuple[Ids, Ids]:
        """A segment repeated with a random period: what makes heads look back."""
        rng = self.rng
        period = rng.randint(max(4, length // 8), 3 * length // 4)
        material = rng.choices(("text", "tokens", "digits", "uuids", "names"), (4, 2, 1, 1.5, 1.5))[0]
        if material == "text":
            segment = self._passage(period)
        elif material == "tokens":
            segment = [rng.randrange(2, self.vocab_size) for _ in range(period)]
        else:
            draw = {
                "digits": lambda: str(rng.randrange(10 ** rng.randint(1, 12))),
                "uuids": lambda: words.random_uuid(rng, "train"),
                "names": lambda: rng.choice((words.variable, words.key_word))(rng, "train"),
            }[material]
            segment = []
            while len(segment) < period:
                segment += self.encode(" " + draw())
            segment = segment[:period]
        ids = (segment * (length // period + 1))[:length]
        return ids, [IGNORE] * (period + 1) + ids[period + 1 :]

    def span(self, length: int) -> tuple[Ids, Ids]:
        """A passage, then spans of it asked for by their first words."""
        rng = self.rng
        context = self._passage(length)
        asked: Ids = []
        labels: Ids = []
        opening = self.encode(rng.choice(SPAN_QUESTIONS).format(start="").rstrip(" "))
        for _ in range(1 if length < 128 else 3):
            take, lead = min(rng.randint(12, 48), length // 5), rng.randint(3, 8)
            room = length - len(asked) - len(opening) - lead - take
            if room < lead + take + 8:
                break
            at = self._word_start(context, room - lead - take)
            answer = context[at + lead : at + lead + take]
            asked += opening + context[at : at + lead] + answer
            labels += [IGNORE] * (len(opening) + lead) + answer
        room = length - len(asked)
        return context[:room] + asked, [IGNORE] * room + labels

    def _ask(self, kind: str, length: int) -> Ask:
        for _ in range(50):
            asker = Asker(self.encode, self.eos, self.level, self.rng, length)
            ask: Ask = getattr(asker, kind)()
            if ask.size <= length:
                return ask
        raise UserError(f"lengths: no row of kind {kind} fits in {length + 1} tokens")

    def _hide(self, ask: Ask, length: int) -> tuple[Ids, Ids]:
        """Needles at random places of text that fills the row, then the questions."""
        hay = self._hay(length - ask.size)
        context, done = list(ask.intro), 0
        for cut, needle in zip(sorted(self._word_start(hay, len(hay)) for _ in ask.needles), ask.needles, strict=True):
            context += hay[done:cut] + needle
            done = cut
        context += hay[done:]
        asked = [token for question, answer in ask.questions for token in question + answer]
        labels = [token for question, answer in ask.questions for token in [IGNORE] * len(question) + answer]
        return context + asked, [IGNORE] * len(context) + labels

    def _hay(self, length: int) -> Ids:
        if self.rng.random() < 0.2:
            noise: Ids = self.encode(" " + NOISE)
            at = self.rng.randrange(len(noise))
            return (noise[at:] + noise * (length // len(noise) + 1))[:length]
        return self._passage(length)

    def _word_start(self, ids: Ids, high: int) -> int:
        """A random position below `high` at which a word starts, or just any if none is found soon."""
        at = first = self.rng.randrange(max(1, high))
        for _ in range(16):
            if at < len(ids) and self.starts_word[ids[at]]:
                return at
            at = at + 1 if at + 1 < high else 0
        return first

    def _passage(self, length: int) -> Ids:
        pool = self.pools[-1] if self.rng.random() < 0.3 else self.pools[0]
        at = self.rng.randrange(len(pool) - length)
        passage: Ids = pool[at : at + length].tolist()
        return passage


@lru_cache(maxsize=1)
def _starts_word(tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    return [token.startswith("Ġ") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
