"""The methods that ship as YAML files, and selections of them by name or by kind."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, get_args

from learnkv.core.component import Component, Status
from learnkv.errors import UserError
from learnkv.persistence.named_configs import config_names, nearest
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy

ALL = "all"
FULL = "full"
"""The full cache: no method, so that `all` leaves it out."""


class Method(NamedTuple):
    """A policy of `configs/policies`."""

    name: str
    kinds: frozenset[str]
    """Which of `KINDS` it is."""


KINDS: dict[str, Callable[[Policy], bool]] = {
    "trained": lambda policy: bool([*policy.parameters()]) or any(part.trained for part in components(policy)),
    "calibrated": lambda policy: any(map(_reads_a_table, components(policy))),
    "extra_passes": lambda policy: bool(policy.capture_spec.extra_passes),
    "online": lambda policy: policy.evict_interval > 0,
    "pages": lambda policy: policy.pages is not None,
    "observation_window": lambda policy: policy.capture_spec.window > 0,
    "precision": lambda policy: policy.precision is not None,
    "residual": lambda policy: policy.residual is not None,
}
"""Kinds of methods: trained by gradient descent; reads a table calibrated for one model; reads the prompt again in
extra passes; evicts while tokens are generated; reads selected pages; scores by the last queries of the prompt, which
are the question's where it is compressed with the context; stores fewer bits, which `all` and the other kinds leave
out; remembers moments of what it evicts."""


def kinds_of(policy: Policy) -> frozenset[str]:
    """The kinds of a policy, derived from its components."""
    return frozenset(kind for kind, holds in KINDS.items() if holds(policy))


def components(policy: Policy) -> list[Component]:
    """The policy and everything that it is made of."""
    return [module for module in policy.modules() if isinstance(module, Component)]


def status_of(policy: Policy) -> Status | None:
    """What a method was made from: the least sure of what its parts were; None: none of them is published."""
    known = {part.status for part in components(policy)}
    return max((status for status in get_args(Status) if status in known), key=get_args(Status).index, default=None)


@functools.cache
def method(name: str) -> Method:
    """The method of `configs/policies/NAME.yaml`."""
    return Method(name, kinds_of(load_policy(name)))


def select_methods(words: Sequence[str] = (ALL,), key: str = "baselines") -> list[str]:
    """Names of methods, each once.

    Args:
        words: `all`, a kind of `KINDS`, a method's name, or a path to a YAML file, which add to the selection in this
            order; with `-` before it, a word takes away from it, and from all methods where no word stands before it.
        key: how the words are called in an error.

    Raises:
        UserError: a word that is none of these, or words that leave no method.
    """
    names: dict[str, None] = {}
    for index, word in enumerate(words):
        removes = word.startswith("-")
        if removes and index == 0:
            names.update(dict.fromkeys(_all()))
        for name in _named(word.removeprefix("-"), word, key):
            if removes:
                names.pop(name, None)
            else:
                names[name] = None
    if words and not names:
        raise UserError(f"{key}={','.join(words)}: leaves no method")
    return list(names)


def _named(word: str, typed: str, key: str) -> Iterable[str]:
    """The methods that one word names."""
    if word == ALL:
        return _all()
    if word in KINDS:
        among = method_names() if word == "precision" else _all()
        return [name for name in among if word in method(name).kinds]
    available = config_names("policies")
    if word not in available and "/" not in word and not word.endswith(".yaml"):
        expected = f"{ALL}, a kind ({', '.join(KINDS)}) or a method of configs/policies"
        raise UserError(f"{key}={typed}: expected {expected}{nearest(word, [ALL, *KINDS, *available])}")
    return [word]


def _all() -> list[str]:
    """Methods that spend entries; a precision makes an axis of its own."""
    return [name for name in method_names() if "precision" not in method(name).kinds]


def method_names() -> list[str]:
    """Names of all methods, those that `all` leaves out too."""
    return [name for name in config_names("policies") if name != FULL]


def _reads_a_table(part: Component) -> bool:
    return bool(part.table_argument) and part.spec()[part.table_argument] is not None
