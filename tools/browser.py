"""The browser that the tests of `report.html` use: Chromium, from Debian's packages where it is missing.

python -m tools.browser      prints its path; installs it where there is none, this is root, and there is apt-get
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = "BROWSER_PATH"
"""Environment variable with the path of another Chromium."""


def find_browser() -> str | None:
    """Path of a Chromium; None where there is none."""
    given = os.environ.get(PATH)
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


def install() -> str:
    """Try to install Debian's Chromium; gives the reason where that is not possible, else nothing."""
    if shutil.which("apt-get") is None:
        return "there is no apt-get"
    if os.geteuid() != 0:
        return "apt-get needs root"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        done = subprocess.run(
            ["apt-get", *words], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
    return ""


def main() -> None:
    """Print where the browser is, or why there is none; neither is an error."""
    reason = "" if find_browser() else install()
    print(find_browser() or f"no browser, its tests will be skipped: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
