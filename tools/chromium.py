"""Look at a page in headless Chromium: pictures at the widths of a phone and a desk, light and dark, and as printed.

    python tools/chromium.py REPORT/index.html --out pictures

The browser is spoken to through the DevTools protocol on two pipes, so nothing but Chromium is needed. Install it with
``apt-get install chromium-headless-shell`` or name one with $CHROMIUM.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
WIDTHS = {400: 800, 1400: 900}
"""Heights by widths, in CSS pixels."""
PATIENCE = 60
"""Seconds to wait for an answer."""


def find_chromium() -> str | None:
    """The browser's path, or ``None`` where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page in a browser of its own."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self.process = process
        self.problems: list[str] = []
        """What the console was told of warnings and errors, and exceptions that nothing caught."""
        self._to, self._from = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        self._number = 0
        self._buffer = b""
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol on the page."""
        return self._call(method, sessionId=self._session, **parameters)

    def open(self, path: Path) -> None:
        """Open a file and wait until it is shown."""
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._hear(self._read())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for.

        Raises:
            RuntimeError: it threw.
        """
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def look(self, *, width: int, dark: bool = False, media: str = "", scripts: bool = True) -> None:
        """Choose the window's width, the colour scheme, the medium, and whether scripts run from the next page on."""
        size = {"width": width, "height": WIDTHS.get(width, 900), "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=width < 600, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """What the window shows, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def pdf(self) -> bytes:
        """The page as it is printed, on A4."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=True)
        return base64.b64decode(answer["data"])

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(RuntimeError, OSError):  # it may have ended before it answers
            self._call("Browser.close")
        self._to.close()
        self._from.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _call(self, method: str, sessionId: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if sessionId is not None:
            message["sessionId"] = sessionId
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._hear(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], PATIENCE)
            if not ready:
                raise RuntimeError(f"The browser has said nothing for {PATIENCE} seconds.")
            part = os.read(self._from.fileno(), 1 << 20)
            if not part:
                raise RuntimeError("The browser has ended.")
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message

    def _hear(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(parameters["args"]))
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.problems.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent" if not parameters["request"]["url"].startswith(("file:", "data:")):
                self.problems.append(f"asked for {parameters['request']['url']}")


# Both are moved out of the way first: one of them may be 3 or 4 already.
_AS_3_AND_4 = """
import fcntl, os, sys
for place, given in zip((3, 4), [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]):
    os.dup2(given, place)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@contextmanager
def opened(binary: str) -> Iterator[Page]:
    """A browser with one empty page, in a profile that is thrown away."""
    reads, writes = os.pipe(), os.pipe()  # the browser reads commands from 3 and answers on 4
    with tempfile.TemporaryDirectory(prefix="chromium.", ignore_cleanup_errors=True) as profile:
        command = [
            sys.executable, "-c", _AS_3_AND_4, str(reads[0]), str(writes[1]),
            binary, "--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", f"--user-data-dir={profile}",
        ]  # fmt: skip
        process = subprocess.Popen(command, pass_fds=(reads[0], writes[1]), stderr=subprocess.DEVNULL)
        os.close(reads[0])
        os.close(writes[1])
        page = Page(process, reads[1], writes[0])
        try:
            yield page
        finally:
            page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    given = parser.parse_args()
    binary = find_chromium()
    if binary is None:
        sys.exit(f"No Chromium found: none of {', '.join(NAMES)} is installed and $CHROMIUM is not set.")
    given.out.mkdir(parents=True, exist_ok=True)
    with opened(binary) as page:
        for width in WIDTHS:
            for dark in (False, True):
                page.look(width=width, dark=dark)
                page.open(given.page)
                for name, whole in (("top", False), ("whole", True)):
                    path = given.out / f"{width}-{'dark' if dark else 'light'}-{name}.png"
                    path.write_bytes(page.screenshot(whole=whole))
        (given.out / "printed.pdf").write_bytes(page.pdf())
        for problem in page.problems:
            print(problem)
    print(f"{given.out}")


if __name__ == "__main__":
    main()
