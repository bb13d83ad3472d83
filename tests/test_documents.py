"""What the documents show is run as it stands there; what they name exists."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from support.forked import run_program

from learnkv.cli.main import COMMANDS
from learnkv.cli.parser import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "learnkv"
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md") if "results" not in path.parts
)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "examples/README.md", *PAGES]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, folder: Path) -> str:
    """What a program prints."""
    (folder / "program.py").write_text(code, encoding="utf-8")
    return run_program(folder / "program.py", folder)


@pytest.mark.parametrize("document", ["README.md", "docs/index.md"])
def test_the_example_answers_from_a_tenth_of_the_cache(document: str, tmp_path: Path) -> None:
    (example,) = blocks(document, "python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 12, f"{len(lines)} lines"
    shown = run(example, tmp_path)
    assert "4817293" in shown
    retained, full = map(int, re.findall(r"(\d+) of (\d+) bytes", shown)[0])
    assert retained < 0.12 * full, shown


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_the_readme_names_every_method() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Methods")[2].partition("## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert {path.stem for path in (ROOT / "configs" / "policies").glob("*.yaml")} <= named


def test_the_scorer_of_the_howto_runs_from_its_yaml(tmp_path: Path) -> None:
    page = "docs/howto/own_method.md"
    (scorer,), (policy,), (program,) = (blocks(page, kind) for kind in ("python", "yaml", "pycon"))
    (tmp_path / "distance.py").write_text(scorer, encoding="utf-8")
    (tmp_path / "distance.yaml").write_text(policy, encoding="utf-8")
    shown = [line.partition(" ")[::2] for line in program.splitlines() if line]
    code = "\n".join(rest for mark, rest in shown if mark in (">>>", "..."))
    expected = [" ".join(line).rstrip() for line in shown if line[0] not in (">>>", "...")]
    assert run(code, tmp_path).splitlines() == expected


def test_the_page_on_bytes_runs(tmp_path: Path) -> None:
    (example,) = blocks("docs/howto/bytes.md", "python")
    ((held, full),) = re.findall(r"\[(\d+)\] of (\d+)", run(example, tmp_path))
    assert 0.09 * int(full) < int(held) <= 0.1 * int(full)


def test_the_page_on_lossless_decoding_runs(tmp_path: Path) -> None:
    (example,) = blocks("docs/howto/lossless.md", "python")
    assert run(example, tmp_path).split() == ["4817293.", "4.0"]


def test_the_model_page_runs(tmp_path: Path) -> None:
    (example,) = blocks("docs/howto/own_model.md", "python")
    run(example.replace('"PATH"', '"reference"'), tmp_path)


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Document, subcommand and words of every command line in a block of shell."""
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["learnkv"]:
                    yield document, words[1], words[2:]
                elif words[:2] in (["python", "train.py"], ["python", "eval.py"]):
                    yield document, words[1].removesuffix(".py"), words[2:]


@pytest.mark.parametrize(("document", "command", "words"), list(commands()))
def test_command_lines_are_understood(document: str, command: str, words: list[str]) -> None:
    """Keys and values fit; nothing is run."""
    about = COMMANDS[command]
    module = __import__(about.module, fromlist=["_"])
    schema = next(iter(get_type_hints(getattr(module, about.function)).values()))
    parse(schema, about.keyed(words), about.configs, command)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document: str) -> None:
    """Paths between backticks, from the root of the repository or of the package; links are MkDocs's to check."""
    text = (ROOT / document).read_text(encoding="utf-8")
    written = r"`((?:src|tests|tools|configs|docs|experiments|benchmarks|examples|scorers|ops|cache|policy)/[\w./-]+)`"
    missing = [path for path in re.findall(written, text) if not any((top / path).exists() for top in (ROOT, PACKAGE))]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_links_outside_the_site_work(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text(encoding="utf-8"))
    assert links
    assert not [link for link in links if "://" not in link and not ((ROOT / document).parent / link).exists()]


def test_the_site_asks_no_other_host() -> None:
    """Fonts, scripts and the star count of a repository would be fetched by whoever reads the pages."""
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "font: false" in settings
    assert not re.search(r"^\s*(repo_url|analytics|extra_javascript):", settings, re.MULTILINE)
    for path in (ROOT / "docs").rglob("*"):
        if path.suffix in (".md", ".css", ".svg"):
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"(?:src=|url\(|@import|!\[[^\]]*\]\()\s*[\"']?https?:", text), path


def test_the_changelog_has_each_section_once_per_version() -> None:
    versions = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(versions) > 1
    for version in versions:
        sections = re.findall(r"^### (.*)$", version, re.MULTILINE)
        assert len(sections) == len(set(sections)), version.splitlines()[0]
        assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def described(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Names in the `Args:` of a docstring."""
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", ast.get_docstring(node) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w[\w, ]*):", block[1], re.MULTILINE) if block else []
    return {name.strip() for entry in entries for name in entry.split(",")}


def accepted(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Arguments of a function, or of a class by its constructor or its fields."""
    if isinstance(node, ast.ClassDef):
        constructors = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
        fields = {
            one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
        return fields.union(*map(accepted, constructors))
    given = node.args
    listed = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in listed if argument}


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_docstrings_describe_arguments_that_exist(file: str) -> None:
    nodes = ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
    checked = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    wrong = {node.name: described(node) - accepted(node) for node in checked if described(node) - accepted(node)}
    assert not wrong
