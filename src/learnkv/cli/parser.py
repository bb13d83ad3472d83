"""Command lines as frozen dataclasses: `config=NAME|PATH key=value …` and `--key value …`."""

import codecs
import dataclasses
import errno
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from learnkv.cli.allocator import keep_freed_memory
from learnkv.errors import Preempted, RunError, UserError
from learnkv.formats.files import FULL_DISK
from learnkv.persistence.config_errors import Words, explain
from learnkv.persistence.named_configs import checked_config, config_names

ADDING = ("ckpt", "config")
"""Keys whose values add up when they are typed again: policies to compare, and files one of which builds on another."""
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Error numbers of a path that the user chose."""
_PLAIN = {"±": "+-", "·": "|", "–": "-", "−": "-", "…": "...", "×": "x", "’": "'"}
"""What is printed instead on a terminal without these characters."""


def parse(schema: type[Any], argv: Sequence[str], kind: str, prog: str = "") -> tuple[Any, str]:
    """An instance of a dataclass from command line words, and its complete resolved YAML.

    Words are `key=value`, `--key=value` or `--key value`; keys of nested dataclasses are dotted; `config=` is read
    first wherever it is typed. Lists (fields of tuple or list type) are written `keep=0.5,0.25` or `--keep 0.5 0.25`;
    two bounds may be one value, `lengths=256`. A key that is typed again replaces what was typed before, lists too;
    only those of
    `config`, and of `ckpt` where it is a list, add up.

    Args:
        schema: a dataclass whose fields all have defaults. A dict field with the metadata `arguments_of` takes the
            constructor arguments of that class (Lightning's Trainer), which are checked and not instantiated. Keys of
            a dataclass field with the metadata `flat` are typed without the field's name.
        argv: words of the command line.
        kind: folder of `configs/` where `config=NAME` is looked up.
        prog: the command in its help; default: `learnkv KIND`.

    Raises:
        UserError: an unknown key, a value of the wrong type, a file that cannot be read.
    """
    foreign = {f.name: f.metadata["arguments_of"] for f in dataclasses.fields(schema) if "arguments_of" in f.metadata}
    groups = _flat_groups(schema)
    parser = _parser(schema, foreign, kind, prog or f"learnkv {kind}")
    if not {"-h", "--help"}.isdisjoint(argv):
        parser.parse_args(["--help"])
    fields = dict(_fields(schema))
    keys = [*fields, *(key for key, _ in parser.get_defaults().items() if key not in fields), *_component_keys(schema)]
    lists = {key for key, parts in fields.items() if any(get_origin(part) in (list, tuple) for part in parts)}
    typed: Words = {}
    for key, values in _pairs(argv, lists):
        adds = key == "config" or (key in ADDING and key in lists)
        typed[key] = typed.get(key, []) + values if adds else values
    pairs = {key for key, parts in fields.items() if _is_pair(parts) and len(typed.get(key, ())) == 1}
    words = {key: values * 2 if key in pairs else values for key, values in typed.items()}
    parsed = _parse(parser, words, typed, lists, keys, kind)
    built = _instantiated(parser, parsed)  # indexed: attributes named keys and items would be its methods
    arguments = {
        name: group(**{f.name: built[f.name] for f in dataclasses.fields(group)}) for name, group in groups.items()
    }
    for f in dataclasses.fields(schema):
        if f.name not in groups:
            arguments[f.name] = built[f.name].as_dict() if f.name in foreign else built[f.name]
    del parsed["config"]
    return schema(**arguments), parser.dump(parsed, skip_unset=False)


def _flat_groups(schema: type[Any]) -> dict[str, type[Any]]:
    """Dataclasses of the fields whose keys are typed without the field's name."""
    hints = get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema) if f.metadata.get("flat")}


def _typed_hints(schema: type[Any]) -> dict[str, Any]:
    """Type of every key, those of flat groups among them."""
    groups = _flat_groups(schema)
    hints = {name: hint for name, hint in get_type_hints(schema).items() if name not in groups}
    return hints | {name: hint for group in groups.values() for name, hint in get_type_hints(group).items()}


def _parser(schema: type[Any], foreign: dict[str, Any], kind: str, prog: str) -> Any:
    """The ArgumentParser of a dataclass, with the arguments of the classes in `foreign`."""
    from jsonargparse import ArgumentParser

    about = (inspect.getdoc(schema) or "").split("\n\n")[0]
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, prog=prog, description=about, print_config=None)
    parser.add_argument("--config", action="config", help=f"YAML file, or a name in configs/{kind}/")
    groups = _flat_groups(schema)
    parser.add_class_arguments(schema, None, as_group=False, skip={*foreign, *groups})
    for group in groups.values():
        parser.add_class_arguments(group, None, as_group=False)
    for name, owner in foreign.items():
        parser.add_class_arguments(owner, name, instantiate=False)
    return parser


def _parse(parser: Any, given: Words, typed: Words, lists: set[str], keys: list[str], kind: str) -> Any:
    """The namespace of config files and given words, words last; errors show them as typed."""
    from jsonargparse import ArgumentError

    configs = typed.get("config", [])
    files = [f"--config={checked_config(kind, name)}" for name in configs]
    words = [f"--{k}={json.dumps(v) if k in lists else v[0]}" for k, v in given.items() if k != "config"]
    try:
        parser.parse_args(files)  # alone first, to tell errors in a file from errors in a word
    except ArgumentError as error:
        raise UserError(f"config={','.join(configs)}: {explain(str(error), {}, keys)}") from None
    try:
        return parser.parse_args(files + words)
    except ArgumentError as error:
        raise UserError(explain(str(error), typed, keys)) from None


def _instantiated(parser: Any, parsed: Any) -> Any:
    """The parsed namespace with its components built; a component's own UserError is raised as it is."""
    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise cause or error from None


def run_main(function: Callable[[Any, str], None], argv: Sequence[str] | None, kind: str, prog: str = "") -> int:
    """Call `function(config, resolved_yaml)`, whose first annotation is the schema of `argv`.

    Args:
        function: the command.
        argv: words of the command line; None: those of this process.
        kind: folder of `configs/` where `config=NAME` is looked up.
        prog: the command in its help.

    Returns:
        Exit code: 2 for bad input, 1 for a run that cannot go on, 143 for one that was preempted and can be continued,
        130 where it was interrupted, each with one line on stderr. Other exceptions keep their traceback.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    print_anywhere()
    keep_freed_memory()
    try:
        if not words:
            raise UserError(
                f"no arguments: expected config=NAME|PATH or key=value; names: {', '.join(config_names(kind))}"
            )
        function(*parse(next(iter(get_type_hints(function).values())), words, kind, prog))
    except UserError as error:
        return report_error(error, 2)
    except RunError as error:
        return report_error(error, 143 if isinstance(error, Preempted) else 1)
    except OSError as error:
        if error.errno in FULL_DISK:
            return report_error(f"no space left on disk for {error.filename or 'the output'}", 1)
        if error.errno not in _FORBIDDEN:
            raise
        return report_error(f"{error.filename or 'the output'}: cannot be written or read: {error.strerror}", 2)
    except KeyboardInterrupt as error:
        return report_error(str(error) or "interrupted", 130)
    return 0


def print_anywhere() -> None:
    """Replace characters that the terminal does not have instead of failing on them."""
    codecs.register_error("learnkv", _plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="learnkv")


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def report_error(error: Exception | str, code: int) -> int:
    """Print one line to stderr and return the exit code."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _fields(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Dotted name of every field, and its alternative types."""
    for name, hint in _typed_hints(schema).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        yield prefix + name, parts
        for part in parts:
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _fields(part, f"{prefix}{name}.")


def _is_pair(parts: tuple[Any, ...]) -> bool:
    """Whether a field is a lower and an upper bound."""
    return any(get_origin(part) is tuple and len(get_args(part)) == 2 and ... not in get_args(part) for part in parts)


def _component_keys(schema: type[Any]) -> Iterator[str]:
    """Dotted names of the constructor arguments of fields that are components."""
    for name, hint in _typed_hints(schema).items():
        for part in get_args(hint):
            if inspect.isclass(part) and part.__module__.startswith("learnkv.") and not dataclasses.is_dataclass(part):
                yield from (f"{name}.init_args.{argument}" for argument in inspect.signature(part).parameters)


def _pairs(argv: Sequence[str], lists: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Keys and their values as typed; `--ckpt a b` takes words up to the next key."""
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        values = [value]
        if not equals:
            ends = (i for i, w in enumerate(words) if w.startswith("--") or (i and re.match(r"[\w.]+=", w)))
            values = words[: next(ends, None) if key in lists else 1]
            del words[: len(values)]
            if not word.startswith("--") or not values or values[0].startswith("--"):
                raise UserError(f"{word}: expected key=value or --key value")
        if key in lists:
            values = [part for value in values for part in map(str.strip, value.strip("[]").split(",")) if part]
        yield key, values
