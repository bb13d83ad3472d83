"""Installing with uv where it does what pip would do, with pip otherwise."""

import subprocess
from typing import Any

import pytest

from tools import install


@pytest.mark.parametrize(
    ("settings", "sources"),
    [
        ("", set()),
        ("global.find-links='/wheels'\nglobal.extra-index-url='file:///more'\n:env:.default-timeout='180'", set()),
        ("global.index-url='https://mirror.example/simple'", {"index-url"}),
        (":env:.index-url='https://mirror.example/a=b'\n:env:.no-index='1'", {"index-url", "no-index"}),
        ("install.no-index='false'", set()),
    ],
)
def test_other_sources_are_recognised(settings: str, sources: set[str]) -> None:
    assert install.sources_of(settings) == sources


@pytest.mark.parametrize(
    ("settings", "codes", "programs", "result"),
    [
        ("", {"uv": 0}, ["uv"], 0),
        ("", {"uv": 2, "pip": 0}, ["uv", "pip"], 0),
        ("", {"uv": 2, "pip": 1}, ["uv", "pip"], 1),
        ("global.index-url='https://mirror.example/simple'", {"pip": 0}, ["pip"], 0),
    ],
)
def test_pip_installs_what_uv_cannot(
    settings: str, codes: dict[str, int], programs: list[str], result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "config" in words:
            return subprocess.CompletedProcess(words, 0, settings, "")
        program = "uv" if words[0].endswith("uv") else "pip"
        ran.append(program)
        assert words[-3:] == ["-c", "constraints.txt", "x"]
        return subprocess.CompletedProcess(words, codes[program], "", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert install.main(["-c", "constraints.txt", "x"]) == result
    assert ran == programs


def test_without_uv_pip_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_uv", lambda: None)
    ran = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(install.subprocess, "run", run)
    assert install.main(["x"]) == 0
    assert ran[-1][1:4] == ["-m", "pip", "install"]
