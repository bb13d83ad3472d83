"""Our policies, built from their YAML, against numbers that the published implementations computed.

Every file of the folder `LEARNKV_GOLDEN` (default: tests/golden) is read; one of a family that is unknown here fails.
The checks are in `originals`.
"""

import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import originals
from support.originals.loading import BUILT, Case, sidecar_of

from learnkv.persistence.methods import components, method_names, status_of
from learnkv.persistence.policies import load_policy

OWN = Path(__file__).resolve().parent / "golden"
FOLDER = Path(os.environ.get("LEARNKV_GOLDEN", OWN))
DATA = (".json", ".npz", ".npy", ".tsv")


CHECKED: set[tuple[Path, int | None]] = set()


def collected(kind: str) -> dict[str, Any]:
    """Checks by prefix of all modules of `originals`."""
    checks: dict[str, Any] = {}
    for module in pkgutil.iter_modules(originals.__path__, "support.originals."):
        theirs = getattr(importlib.import_module(module.name), kind, {})
        assert not theirs.keys() & checks.keys(), f"{module.name}: a family that another module checks already"
        checks |= theirs
    return checks


FAMILIES, FILES = collected("FAMILIES"), collected("FILES")


def family_of(name: str) -> str | None:
    """The longest prefix known that fits a file's name."""
    fits = [family for family in FAMILIES | FILES if name == family or name.startswith((f"{family}_", f"{family}/"))]
    return max(fits, key=len, default=None)


def found(folder: Path) -> Iterator[Any]:
    """One pytest parameter (file, name in the folder, case number) per case; number None for a file without cases."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in DATA):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name.startswith("inputs_") or (path.suffix == ".npz" and path.with_suffix(".json").exists()):
            continue
        family = family_of(name)
        records = sidecar_of(path).get("cases", []) if family in FAMILIES and path.suffix == ".json" else []
        for number, record in enumerate(records):
            yield pytest.param(path, name, number, id=f"{name}-{record['id']}")
        if not records:
            yield pytest.param(path, name, None, id=path.relative_to(folder).as_posix())


def test_the_folder_holds_golden_files() -> None:
    assert list(found(FOLDER)), f"{FOLDER} holds no golden file"


@pytest.mark.parametrize("file", ["strange_mha101.npz", "strange_mha101.json", "curve.npy", "strange_s1/config.json"])
def test_a_file_of_an_unknown_family_fails(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    (unknown,) = found(tmp_path)
    with pytest.raises(AssertionError, match=r"no check for a file of this family"):
        test_golden(*unknown.values)


@pytest.mark.parametrize(("file", "text"), [("adakv_mha101.npz", ""), ("adakv_mha101.json", "{}")])
def test_a_file_without_its_cases_fails(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    (bare,) = found(tmp_path)
    with pytest.raises(AssertionError, match=r"no cases beside the data"):
        test_golden(*bare.values)


@pytest.mark.parametrize(("path", "name", "number"), list(found(FOLDER)))
def test_golden(path: Path, name: str, number: int | None) -> None:
    CHECKED.add((path, number))
    family = family_of(name)
    assert family is not None, f"{name}: no check for a file of this family"
    if family in FILES:
        FILES[family](path)
        return
    assert number is not None, f"{name}: no cases beside the data"
    case = Case(path.with_suffix(""), number)
    FAMILIES[family](case)
    assert not case.unread, f"{name}: no check for {', '.join(case.unread)}"


def test_methods_have_the_numbers_of_the_originals_where_their_status_says_so() -> None:
    """What a golden file checks, and nothing else, has that status; the cases above are not computed again."""
    for one in found(FOLDER):
        path, name, number = one.values
        if (path, number) not in CHECKED:
            test_golden(path, name, number)
    for name in BUILT:
        assert status_of(load_policy(name)) in ("numbers", "port"), name
    if FOLDER != OWN:
        return
    checked = {type(part) for name in BUILT for part in components(load_policy(name))}
    for name in method_names():
        parts = [part for part in components(load_policy(name)) if part.status in ("numbers", "port")]
        assert {type(part) for part in parts} <= checked, name
