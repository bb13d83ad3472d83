"""A real browser that opens pages from the disk, without a network; skipped where there is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.opened import Opened
from support.page import contents

from learnkv.evaluation.html.page import write_page
from tools.browser import PATH, find_browser


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; processes of root need it without its sandbox, and it opens nothing but our own pages."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tested")
    path = find_browser()
    if path is None:
        pytest.skip(f"no Chromium was found (make test-browser tries to install it, {PATH}= names it)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page") / "report.html", contents())


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """Opens the made-up report: `opened(tab, …)` with options of a browser's context."""
    pages: list[Opened] = []

    def open_page(tab: str = "", file: Path = report, **options: Any) -> Opened:
        pages.append(Opened(browser, file, tab, **options))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
