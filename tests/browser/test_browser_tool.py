"""Finding Chromium, and saying why there is none."""

import subprocess
from typing import Any

import pytest

from tools import browser


def test_the_one_that_is_named_comes_first_then_the_usual_names(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"google-chrome": "/x/google-chrome", "chromium-browser": "/x/chromium-browser"}
    monkeypatch.setattr(browser.shutil, "which", present.get)
    monkeypatch.delenv(browser.PATH, raising=False)
    assert browser.find_browser() == "/x/chromium-browser"
    monkeypatch.setenv(browser.PATH, "/mine")
    assert browser.find_browser() == "/mine"
    monkeypatch.delenv(browser.PATH)
    present.clear()
    assert browser.find_browser() is None


@pytest.mark.parametrize(
    ("apt", "user", "code", "reason"),
    [
        (None, 0, 0, "there is no apt-get"),
        ("/usr/bin/apt-get", 1000, 0, "apt-get needs root"),
        ("/usr/bin/apt-get", 0, 100, "E: Unable to fetch"),
    ],
)
def test_without_a_browser_the_reason_is_printed(
    apt: str | None,
    user: int,
    code: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, code, "", "W: a warning\nE: Unable to fetch\n")

    monkeypatch.delenv(browser.PATH, raising=False)
    monkeypatch.setattr(browser.shutil, "which", lambda name: apt if name == "apt-get" else None)
    monkeypatch.setattr(browser.os, "geteuid", lambda: user)
    monkeypatch.setattr(browser.subprocess, "run", run)
    browser.main()
    assert capsys.readouterr().err.strip() == f"no browser, its tests will be skipped: {reason}"
