"""Look at a page in headless Chromium: pictures at the widths of a phone and a desk, light and dark, and as printed.

    python tools/chromium.py REPORT/index.html --out pictures

Playwright drives the browser. The browser is one of this machine: install it with ``apt-get install
chromium-headless-shell``, or name one with $CHROMIUM.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = {400: 800, 1400: 900}
"""Heights by widths, in CSS pixels."""


def find_chromium() -> str | None:
    """The browser's path, or ``None`` where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(binary: str) -> Iterator[Any]:
    """A browser, as Playwright has it, that is closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield chromium
        finally:
            chromium.close()


def open_page(
    chromium: Any, path: Path, *, width: int, dark: bool = False, scripts: bool = True, problems: list[str]
) -> Any:
    """Open a file in a window of its own.

    Args:
        scripts: whether scripts run in it.
        problems: gets what the console is told of warnings and errors, exceptions that nothing caught, and requests for
            what is not a file.
    """
    page = chromium.new_context(
        viewport={"width": width, "height": WIDTHS.get(width, 900)},
        is_mobile=width < 600,
        color_scheme="dark" if dark else "light",
        java_script_enabled=scripts,
    ).new_page()

    def note_message(message: Any) -> None:
        if message.type in ("error", "warning", "assert"):
            problems.append(message.text)

    def note_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            problems.append(f"asked for {request.url}")

    page.on("console", note_message)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", note_request)
    page.goto(path.resolve().as_uri())
    return page


def print_pdf(page: Any) -> bytes:
    """The page as it is printed, on A4."""
    content: bytes = page.pdf(format="A4", print_background=True)
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    given = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        sys.exit(f"No Chromium found: none of {', '.join(NAMES)} is installed and $CHROMIUM is not set.")
    given.out.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    with browser(binary) as chromium:
        for width in WIDTHS:
            for dark in (False, True):
                page = open_page(chromium, given.page, width=width, dark=dark, problems=problems)
                for name, whole in (("top", False), ("whole", True)):
                    path = given.out / f"{width}-{'dark' if dark else 'light'}-{name}.png"
                    page.screenshot(path=path, full_page=whole)
        (given.out / "printed.pdf").write_bytes(print_pdf(page))
    for problem in problems:
        print(problem)
    print(f"{given.out}")


if __name__ == "__main__":
    main()
