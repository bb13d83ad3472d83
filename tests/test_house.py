"""The figures of the structure that `make house` prints: lengths, circles, names."""

from pathlib import Path

import pytest

from tools import house
from tools.banned_names import BANNED, KINDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("title", house.CHECKS)
def test_the_house_holds(title: str) -> None:
    assert not house.CHECKS[title](ROOT)


def test_functions_stay_short() -> None:
    files = house.sources(ROOT)
    assert len(files) > 150
    assert house.median_function(files) <= house.LONGEST_MEDIAN


def test_every_ban_says_where_and_why() -> None:
    rooms = {path.name for path in (ROOT / "src" / "learnkv").iterdir() if path.is_dir()}
    for ban in BANNED:
        assert ban.name == ban.name.lower()
        assert set(ban.kinds) <= set(KINDS)
        assert set(ban.rooms) <= rooms
        assert bool(ban.why) == (ban.kinds != KINDS or bool(ban.rooms)), ban


@pytest.mark.parametrize(
    ("room", "source", "kind"),
    [
        ("cache", "class Reading: ...", "class"),
        ("cache", "class Tail: ...", "class"),
        ("policy", "def f(start): ...", "parameter"),
        ("core", "class Scores:\n    prior: int = 0", "attribute"),
        ("scorers", "class S:\n    causal = True", None),
        ("allocators", "class A:\n    causal = True", "attribute"),
        ("scorers", "class S:\n    def judge(self): ...", "function"),
        ("scorers", "class S:\n    def _judge(self): ...", None),
        ("training", "f = lambda *seen: 0", None),
        ("training", "def f(*, seen): ...", "parameter"),
        ("ops", "class Tail: ...", None),
        ("cache", "def f(start): ...", None),
        ("training", "def f(steps): ...", None),
        ("training", "def f(every_step, baseline): ...", None),
    ],
)
def test_a_banned_name_is_found_where_it_is_banned(room: str, source: str, kind: str | None) -> None:
    faults = house.banned_names("file.py", room, house.names_in(source))
    assert [fault.split()[1] for fault in faults] == ([kind] if kind else [])


@pytest.mark.parametrize("text", ["policy:\n  init_args: {mix: 1}", "- exploration: 0"])
def test_a_banned_key_is_found(text: str) -> None:
    assert len(house.banned_names("file.yaml", "configs", house.keys_of(text))) == 1


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("one = 1", 1),
        ("def f(at): ...", 1),
        ("for found in (): ...", 1),
        ("self.held = 1", 1),
        ("def mine(): ...", 1),
        ("f(one, at=1); tensor[0].at", 0),
        ("import one; found_rows = 1", 0),
    ],
)
def test_a_vague_name_is_found_where_it_is_given(source: str, count: int) -> None:
    assert len(house.vague_names("file.py", source)) == count


@pytest.mark.parametrize("folder", house.PACKAGES)
def test_replaced_names_are_found_in_every_folder(folder: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "file.py"
    path.parent.mkdir(parents=True)
    path.write_text("def f(judge): ...")
    assert len(house.replaced_names(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "text", "count"),
    [
        ("policy/policy.py", "x = 1  # what was said", 1),
        ("policy/policy.py", 'raise UserError("judged by scores")', 1),
        ("policy/policy.py", "def is_said(): ...\nclass WasTold: ...", 2),
        ("policy/policy.py", "unfolded = saidso = retold = 1", 0),
        ("data/ruler_text.py", 'TEXT = "should be told"', 0),
        ("data/ruler_text.py", 'told(f"should be told {x}")', 1),
        ("data/ruler_text.py", '"""What is told."""\ntold = 1', 2),
        ("reference/policy/README.md", "Judge by the table.", 1),
    ],
)
def test_private_words_are_found_in_code_and_prose(file: str, text: str, count: int) -> None:
    assert len(house.private_words(file, text)) == count


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "src" / "learnkv"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("def f():\n    from learnkv import b")
    (package / "b.py").write_text("if TYPE_CHECKING:\n    from .a import f")
    assert set(house.cycle(house.sources(tmp_path))) == {"learnkv.a", "learnkv.b"}
