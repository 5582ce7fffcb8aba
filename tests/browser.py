"""A real TensorBoard and a real browser, both on this machine alone."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Frame, Page

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
WAIT = 30  # seconds, for a server or a page, on a busy machine


def has_chromium() -> bool:
    """Return whether there is a browser to test with."""
    return shutil.which(CHROMIUM) is not None


@contextmanager
def serving(logdir: Path, *, fast: bool) -> Iterator[str]:
    """Run TensorBoard on a free port of 127.0.0.1, and end it whatever happens.

    Args:
        logdir: The folder it shows.
        fast: Whether its data server reads the files, or Python does.

    Yields:
        Its address.
    """
    words = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    words += [f"--load_fast={'true' if fast else 'false'}", "--reload_interval", "1"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", *words],
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # so that its data server is ended with it
        )
        try:
            yield _address(process, said)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _address(process: subprocess.Popen[bytes], said: IO[str]) -> str:
    """Return the address that TensorBoard says it answers at."""
    for _ in range(WAIT * 20):
        said.seek(0)
        if found := re.search(r"http://127\.0\.0\.1:\d+", said.read()):
            return found.group()
        if process.poll() is not None:
            break
        time.sleep(0.05)
    said.seek(0)
    raise RuntimeError(f"TensorBoard has not started within {WAIT} s:\n{said.read()}")


@contextmanager
def browsing() -> Iterator["Browser"]:
    """Run the browser without a window, and close it whatever happens."""
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page of TensorBoard; what goes wrong in it is noted.

    Attributes:
        page: The page.
        troubles: Errors of scripts and requests that have failed, in words.
    """

    def __init__(self, page: "Page", address: str) -> None:
        self.page, self._address = page, address
        self.troubles: list[str] = []
        page.set_default_timeout(1000 * WAIT)
        page.on("pageerror", lambda error: self.troubles.append(str(error)))
        page.on("requestfailed", lambda request: self._failed(request.url, request.failure))
        page.on("response", lambda response: self._answered(response.url, response.status))
        page.on("console", lambda message: self._said(message.type, message.text))

    def go(self, tab: str) -> None:
        """Open a tab of TensorBoard by its name in the address."""
        self.page.goto(f"{self._address}/#{tab}")

    def board(self) -> "Frame":
        """Open our tab, wait until it shows what it has to, and return what is in it."""
        self.go("concept_guard")
        self.page.wait_for_selector("iframe")
        frame = self.page.query_selector("iframe")
        assert frame is not None
        content = frame.content_frame()
        assert content is not None
        content.wait_for_selector("main[aria-busy=false]", state="attached")
        return content

    def _failed(self, url: str, failure: str | None) -> None:
        if failure != "net::ERR_ABORTED":  # the page was left
            self.troubles.append(f"{url}: {failure}")

    def _answered(self, url: str, status: int) -> None:
        if status >= 400:
            self.troubles.append(f"{url}: {status}")

    def _said(self, kind: str, text: str) -> None:
        ours = "Three.js" not in text  # TensorBoard itself warns of that
        if ours and kind in {"error", "warning"}:
            self.troubles.append(text)


def pictures_loaded(frame: "Frame") -> bool:
    """Return whether every picture of a frame arrives, also those that wait to be seen."""
    return bool(
        frame.evaluate(
            "Promise.all([...document.images].map(image => {"
            " image.loading = 'eager'; return image.decode().then(() => true, () => false); }))"
            ".then(all => all.every(Boolean))"
        )
    )
