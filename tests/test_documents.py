"""What the README and CONTRIBUTING show is run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_example_answers_from_a_tenth_of_the_cache(tmp_path: Path) -> None:
    (example,) = blocks("README.md", "python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 12, f"{len(lines)} lines"
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "4817293" in run.stdout, run.stdout
    held, full = map(int, re.findall(r"(\d+) of (\d+) bytes", run.stdout)[0])
    assert held < 0.12 * full, run.stdout


def test_the_scorer_of_contributing_runs_from_its_yaml(tmp_path: Path) -> None:
    (scorer,), (policy,), (program,) = (blocks("CONTRIBUTING.md", kind) for kind in ("python", "yaml", "pycon"))
    (tmp_path / "mine.py").write_text(scorer, encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(policy, encoding="utf-8")
    shown = [line.partition(" ")[::2] for line in program.splitlines() if line]
    code = "\n".join(rest for mark, rest in shown if mark in (">>>", "..."))
    expected = [" ".join(line).rstrip() for line in shown if line[0] not in (">>>", "...")]
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == expected
