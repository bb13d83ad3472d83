"""The walks in docs/design.md are those of the code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_drawing_is_the_trace() -> None:
    """Files in order, and no call to a room above that the drawing does not have."""
    document = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    drawn = document.partition("<!-- walk: begin -->\n")[2].partition("<!-- walk: end -->")[0]
    run = subprocess.run(
        [sys.executable, "-m", "tools.walk"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    traced = run.stdout[run.stdout.index("### One prompt") :]
    assert drawn.strip() == traced.strip(), "the walks have changed: make walk writes them"
