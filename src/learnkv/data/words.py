"""Keys, values and variable names, each assigned to one split by a stable hash of its string.

Evaluation and training share a vocabulary of words, numbers, UUIDs and names, but never a string: `split_of` is the
single rule, and sampling is repeated until the string belongs to the requested split.
"""

import random
import re
import uuid
import zlib
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Literal

Split = Literal["train", "eval"]
Language = Literal["english", "german", "greek"]
SPLITS: tuple[Split, ...] = ("train", "eval")


def split_of(text: str) -> Split:
    """The split a word, number, UUID or variable name belongs to: one in four strings is for evaluation."""
    return "eval" if zlib.crc32(text.encode()) % 4 == 0 else "train"


def draw(make: Callable[[], str], split: Split, taken: set[str] | None = None) -> str:
    """First string from `make` that belongs to `split` and is not in `taken`, to which it is added."""
    while True:
        text = make()
        if split_of(text) == split and (taken is None or text not in taken):
            if taken is not None:
                taken.add(text)
            return text


OTHER_LANGUAGES: dict[str, tuple[str, str]] = {  # adjectives and nouns; training data is English
    "german": (
        "alt breit dunkel eng fern frisch früh glatt groß grün gütig hart heiß hell höflich jung kahl kalt kühn kurz "
        "lang laut leise müde mutig nah neu rasch rot sanft scharf schön schwer spät stark still süß tief treu weiß",
        "Apfel Bäcker Brücke Dach Eiche Fenster Fluss Garten Gürtel Hafen Hügel Insel Jäger Käse Kirche Küste Lampe "
        "Löffel Mantel Mühle Nagel Ofen Pferd Quelle Rücken Schlüssel Schüssel Segel Straße Stühle Tasche Tür Ufer "
        "Vogel Wiese Wolke Würfel Zaun Ziege Zwiebel",
    ),
    "greek": (
        "αργός βαθύς βαρύς γλυκός γρήγορος δυνατός ελαφρύς ζεστός ήσυχος θερμός καθαρός καλός κρύος λευκός μακρύς "
        "μαύρος μεγάλος μικρός νέος ξηρός παλιός πλατύς πράσινος σκληρός σοφός στενός ψηλός ωραίος",
        "αέρας βιβλίο βουνό βροχή γάτα γέφυρα δάσος δρόμος ελιά ζυγός ήλιος θάλασσα κήπος κλειδί λίμνη λύκος μήλο "
        "μύλος νησί ξύλο όνειρο παράθυρο πέτρα πηγάδι ποτάμι ρόδα σκάλα σπίτι τραπέζι φεγγάρι χωριό ψωμί ώρα",
    ),
}


@lru_cache
def word_list(kind: Literal["adjective", "noun", "verb"], split: Split) -> tuple[str, ...]:
    """Lower-case wonderwords of 3 to 10 letters that belong to `split`, sorted."""
    lines = (files("wonderwords") / "assets" / f"{kind}list.txt").read_text(encoding="utf-8").split("\n")
    words = {line.strip() for line in lines if re.fullmatch(r"[a-z]{3,10}", line.strip())}
    return tuple(sorted(word for word in words if split_of(word) == split))


def key_word(rng: random.Random, split: Split, taken: set[str] | None = None) -> str:
    """An adjective-noun key; both words and the joined key belong to `split`."""
    adjectives, nouns = word_list("adjective", split), word_list("noun", split)
    return draw(lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}", split, taken)


def foreign_key(language: str, rng: random.Random, split: Split, taken: set[str] | None = None) -> str:
    """An adjective and a noun of another language, joined; the key belongs to `split`."""
    adjectives, nouns = (words.split() for words in OTHER_LANGUAGES[language])
    return draw(lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}", split, taken)


def number(rng: random.Random, split: Split, taken: set[str] | None = None, digits: int = 7) -> str:
    """A decimal number of exactly `digits` digits, the first not zero."""
    return draw(lambda: str(rng.randrange(10 ** (digits - 1), 10**digits)), split, taken)


def random_uuid(rng: random.Random, split: Split, taken: set[str] | None = None) -> str:
    """A version 4 UUID in its 36-character form."""
    return draw(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)), split, taken)


def variable(rng: random.Random, split: Split, taken: set[str] | None = None, letters: int = 5) -> str:
    """A variable name of `letters` random capital letters."""
    return draw(lambda: "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=letters)), split, taken)


def value(kind: str, rng: random.Random, split: Split, taken: set[str] | None = None) -> str:
    """A needle's key or value of `kind`: "words", "numbers", "uuids" or a language other than English."""
    if kind in OTHER_LANGUAGES:
        return foreign_key(kind, rng, split, taken)
    return {"words": key_word, "numbers": number, "uuids": random_uuid}[kind](rng, split, taken)
