"""The one config system: `config=NAME|PATH key=value …` and `--key value …`, parsed into frozen dataclasses."""

import dataclasses
import errno
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from learnkv.errors import Preempted, RunError, UserError
from learnkv.persistence.named_configs import config_names, find_config, nearest


def parse(schema: type[Any], argv: Sequence[str], kind: str, name: str = "") -> tuple[Any, str]:
    """An instance of the dataclass `schema` from command line words, and its complete resolved YAML.

    Words are `key=value`, `--key=value` or `--key value`; keys of nested dataclasses are dotted; `config=` is read
    first wherever it stands. Lists (fields of tuple or list type) are written `keep=0.5,0.25`, `--keep 0.5 0.25` or by
    repeating the key. A dict field with the metadata `arguments_of` takes the constructor arguments of that class
    (Lightning's Trainer), checked but not built. A dataclass field with the metadata `flat` has its keys typed without
    its name. Every field has a default. Raises UserError where a word does not fit.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    about = (inspect.getdoc(schema) or "").split("\n\n")[0]
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, prog=f"learnkv {name or kind}", description=about, print_config=None
    )
    parser.add_argument("--config", action="config", help=f"YAML file, or a name in configs/{kind}/")
    foreign = {f.name: f.metadata["arguments_of"] for f in dataclasses.fields(schema) if "arguments_of" in f.metadata}
    groups = _flat_groups(schema)
    parser.add_class_arguments(schema, None, as_group=False, skip={*foreign, *groups})
    for group in groups.values():
        parser.add_class_arguments(group, None, as_group=False)
    for name, owner in foreign.items():
        parser.add_class_arguments(owner, name, instantiate=False)
    if not {"-h", "--help"}.isdisjoint(argv):
        parser.parse_args(["--help"])
    fields = dict(_fields(schema))
    known = [*fields, *(key for key, _ in parser.get_defaults().items() if key not in fields), *_within(schema)]
    lists, typed = {key for key, is_list in fields.items() if is_list}, dict[str, list[str]]()
    for key, values in _pairs(argv, lists):
        typed[key] = typed.get(key, []) + values if key in lists or key == "config" else values
    files = [f"--config={find_config(kind, name)}" for name in typed.get("config", [])]
    words = [f"--{k}={json.dumps(v) if k in lists else v[0]}" for k, v in typed.items() if k != "config"]
    try:
        at = f"config={','.join(typed.get('config', []))}: "
        parser.parse_args(files)  # alone first: what is wrong here was not typed
        at = ""
        parsed = parser.parse_args(files + words)
    except ArgumentError as error:
        raise UserError(at + _explain(str(error), {} if at else typed, known)) from None
    built = _instantiated(parser, parsed)  # indexed: as attributes, keys and items would be its methods
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


def _instantiated(parser: Any, parsed: Any) -> Any:
    """What was parsed, built; what a component says of its arguments is told as it said it."""
    try:
        return parser.instantiate(parsed)
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise cause or error from None


def run_main(function: Callable[[Any, str], None], argv: Sequence[str] | None, kind: str, name: str = "") -> int:
    """Call `function(config, resolved_yaml)`, its first annotation being the schema of `argv`; gives the exit code.

    Bad input is one line and 2; a run that cannot go on is one line and 1, one that was asked to end and can be
    continued one line and 143; a bug keeps its traceback.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if not words:
            raise UserError(
                f"no arguments: expected config=NAME|PATH or key=value; names: {', '.join(config_names(kind))}"
            )
        function(*parse(next(iter(get_type_hints(function).values())), words, kind, name))
    except UserError as error:
        return report_error(error, 2)
    except RunError as error:
        return report_error(error, 143 if isinstance(error, Preempted) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return report_error(f"no space left on disk for {error.filename or 'the output'}", 1)
    except KeyboardInterrupt:
        return report_error("interrupted", 130)
    return 0


def report_error(error: Exception | str, code: int) -> int:
    """Print one line; gives the exit code."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code


def _fields(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted name of every field, and whether it is a list."""
    for name, hint in _typed_hints(schema).items():
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        yield prefix + name, any(get_origin(part) in (list, tuple) for part in parts)
        for part in parts:
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _fields(part, f"{prefix}{name}.")


def _within(schema: type[Any]) -> Iterator[str]:
    """Dotted names of the arguments of fields that hold a component."""
    for name, hint in _typed_hints(schema).items():
        for part in get_args(hint):
            if inspect.isclass(part) and part.__module__.startswith("learnkv.") and not dataclasses.is_dataclass(part):
                yield from (f"{name}.init_args.{one}" for one in inspect.signature(part).parameters)


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
        yield (
            key,
            [p for v in values for p in map(str.strip, v.strip("[]").split(",")) if p] if key in lists else values,
        )


def _explain(message: str, typed: dict[str, list[str]], known: list[str]) -> str:
    """One line from jsonargparse's message: the key as typed, what was expected, what came."""
    path = list(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)|Option '([^']+)' is not accepted", message)
    if unknown:
        path.append(unknown[1] or unknown[2])
    key = ".".join(path)
    shown = f"{key}={','.join(typed[key])}" if key in typed else key
    if unknown:
        return f"{shown}: unknown key{_meant(key, message, known)}"
    if key and (absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)):
        return f"{shown}: {absent[1]} has no {absent[2]}{nearest(absent[2], dir(sys.modules.get(absent[1])))}"
    if key and (count := re.search(r"Expected a tuple with (\d+) elements", message)):
        return f"{shown}: expected {count[1]} values"
    if key and (given := re.search(r"Unexpected import path format: (\S+)", message)):
        return f"{shown}: expected the path of a class, got {given[1]}"
    problem = re.search(r"Expected an? (.+?)\. Got value: (.*)", message)
    if key and problem:
        wanted = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", problem[1])
        wanted = wanted.replace("tuple", "list")
        wanted = re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", wanted)
        return f"{shown}: expected {wanted}, got {problem[2] or 'nothing'}"
    return f"{shown}: {message}" if key else message


def _meant(key: str, message: str, known: list[str]) -> str:
    """The name that a mistyped key stands for, among ours or among the arguments of a component."""
    above, _, last = key.rpartition(".")
    if above and not any(one.startswith(f"{above}.") for one in known) and (of_class := _arguments(message)):
        return nearest(last, of_class)
    component = [one for one in known if one.endswith(f".init_args.{key.partition('.')[0]}")]
    return f"; did you mean {component[0]}?" if component else nearest(key, known)


def _arguments(message: str) -> list[str]:
    """What the constructor takes of the class that jsonargparse speaks of last."""
    named = re.findall(r"given class_path '([\w.]+)\.(\w+)'", message)
    found = getattr(sys.modules.get(named[-1][0]), named[-1][1], None) if named else None
    return list(inspect.signature(found).parameters) if inspect.isclass(found) else []
