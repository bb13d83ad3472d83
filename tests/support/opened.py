"""A page that is open in a browser, and what went wrong or was asked of a network since then."""

from pathlib import Path
from typing import Any

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 800}


class Opened:
    """A page of a file, in a context of its own without a network."""

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
