"""Pages in a real browser: chromium without a window, which reaches nothing outside this machine.

The browser lives in a thread of its own: the event loop of its driver would else seem to run in the thread of every
test that follows, and asyncio would refuse to work there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import psutil
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

Size = Literal["phone", "desktop"]
Seen = TypeVar("Seen")

SIZES_PX: dict[Size, tuple[int, int]] = {"phone": (390, 844), "desktop": (1280, 900)}
"""(width, height) of the window."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MARK = "HEADSTART_TEST_BROWSER"
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
_SETTLED = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
_LEAVE_S = 15.0


def find_chromium() -> str | None:
    """Where chromium is installed, if it is."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    return None


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser for as long as the context lasts; the test is skipped where there is none.

    Raises:
        AssertionError: a process of the browser outlives the context.
    """
    executable = find_chromium()
    if executable is None:
        pytest.skip("no chromium was found: install one (apt-get install chromium) to look at pages in a browser")
    pytest.importorskip("playwright.sync_api", reason="playwright drives the browser: pip install playwright")
    browser = Browser(executable)
    try:
        yield browser
    finally:
        browser.close()


class Browser:
    """Opens pages, one at a time, each in a profile of its own."""

    def __init__(self, executable: str) -> None:
        self._mark = uuid.uuid4().hex
        self._thread = ThreadPoolExecutor(1, "browser")
        self._playwright: Any = None
        self._chromium: Any = None
        self._driver: set[psutil.Process] = set()
        try:
            self._thread.submit(self._start, executable).result()
        except BaseException:
            self.close()
            raise

    def visit(
        self, address: Path | str, act: Callable[[Page], Seen], *, size: Size = "desktop", loopback: bool = False
    ) -> Seen:
        """Open a file or an address, let `act` look at the page and use it, and return what `act` returns.

        `act` runs in the browser's thread; what it raises is raised here. A phone has a touch screen and obeys the
        page's viewport.

        Args:
            loopback: whether the page may ask servers on this machine. Otherwise it may ask for nothing but itself.

        Raises:
            AssertionError: the page reported an error, opened a dialogue, or asked for what it may not.
        """
        target = address.resolve().as_uri() if isinstance(address, Path) else address
        return self._thread.submit(self._visit, target, act, size, loopback).result()

    def close(self) -> None:
        """End the browser and its driver, and make sure that they are gone."""
        self._thread.submit(self._stop).result()
        self._thread.shutdown()
        left = self._left()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not left, f"processes of the browser outlived it: {left}"

    # In the browser's thread

    def _start(self, executable: str) -> None:
        from playwright.sync_api import sync_playwright

        before = set(psutil.Process().children(recursive=True))
        self._playwright = sync_playwright().start()
        self._driver = set(psutil.Process().children(recursive=True)) - before
        self._chromium = self._playwright.chromium.launch(
            executable_path=executable, args=list(_ARGUMENTS), env={**os.environ, _MARK: self._mark}
        )

    def _stop(self) -> None:
        try:
            if self._chromium is not None:
                self._chromium.close()
        finally:
            if self._playwright is not None:
                self._playwright.stop()

    def _visit(self, target: str, act: Callable[[Page], Seen], size: Size, loopback: bool) -> Seen:
        width, height = SIZES_PX[size]
        phone = size == "phone"
        context = self._chromium.new_context(
            viewport={"width": width, "height": height},
            is_mobile=phone,
            has_touch=phone,
            reduced_motion="reduce",
            service_workers="block",
        )
        complaints: list[str] = []

        def decide(route: Route) -> None:
            url = route.request.url
            if _may_ask(url, target, loopback):
                route.continue_()
            else:
                complaints.append(f"it asked for {url[:200]}")
                route.abort()

        def watch(page: Page) -> None:
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on(
                "dialog", lambda dialogue: (complaints.append(f"a dialogue: {dialogue.message}"), dialogue.dismiss())
            )
            page.on(
                "websocket",
                lambda socket: (
                    None if _may_ask(socket.url, target, loopback) else complaints.append(f"it asked for {socket.url}")
                ),
            )

        try:
            context.route("**/*", decide)
            context.on("page", watch)
            page = context.new_page()
            page.goto(target)
            seen = act(page)
            # What the page complains of is told before the answer to a later question is.
            page.evaluate(_SETTLED)
        except BaseException as error:
            for complaint in complaints:
                error.add_note(f"the page: {complaint}")
            raise
        finally:
            context.close()
        assert not complaints, f"{target}: {'; '.join(complaints)}"
        return seen

    # Processes

    def _left(self) -> list[psutil.Process]:
        """Processes of the browser and its driver that are still there, a while after they were ended."""
        deadline = time.monotonic() + _LEAVE_S
        while True:
            ours = {process for process in psutil.process_iter() if self._is_ours(process)}
            if not ours or time.monotonic() > deadline:
                return sorted(ours, key=lambda process: process.pid)
            time.sleep(0.05)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return process in self._driver or process.environ().get(_MARK) == self._mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


def _may_ask(url: str, target: str, loopback: bool) -> bool:
    parts = urlsplit(url)
    if parts.scheme in ("data", "blob", "about"):
        return True
    if parts.scheme == "file":
        return url.partition("#")[0] == target.partition("#")[0]
    return loopback and parts.hostname in _LOOPBACK
