"""A real browser that opens pages from the disk, without a network; skipped where there is none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.page import contents

from learnkv.evaluation.html.page import write_page
from tools.browser import PATH, find_browser

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


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


class Opened:
    """A page, and what went wrong or was asked of a network since it was opened."""

    def __init__(self, browser: Any, file: Path, tab: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": WIDE, "offline": True, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # a machine may be busy with other tests
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.uri = file.resolve().as_uri()
        self.page.goto(self.uri + (f"#tab={tab}" if tab else ""))

    def texts(self, selector: str) -> list[str]:
        """Texts of the elements that are there."""
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def selected(self) -> str:
        """The tab that is shown."""
        (tab,) = self.texts("[role=tab][aria-selected=true]")
        (section,) = self.page.locator("[role=tabpanel]:not([hidden])").all()
        assert section.get_attribute("data-tab") == tab
        return tab

    def close(self) -> None:
        """Close it; whatever a test did must not have raised an error or loaded anything."""
        assert self.faults == []
        loaded = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert loaded == [loaded[0]]
        assert loaded[0].startswith("file:")
        self.context.close()


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
