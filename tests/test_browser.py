"""The tests' own browser and the laws of pages: each kind of fault is seen, and nothing is left behind."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.browser import Browser, open_browser
from tests.page_laws import broken_laws

DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
GOOD = "<h1>A title</h1><p>Some text.</p>"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of this machine that gives one page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page_of("<h1>served</h1>").encode()
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def page_of(body: str, head: str = "<title>A page</title>") -> str:
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{viewport}<link rel="icon" href="data:,">{head}{body}'


def write(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "page.html"
    path.write_text(page_of(body), encoding="utf-8")
    return path


def test_a_page_is_used_and_its_answer_returned(browser: Browser, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "<button onclick=\"this.textContent = 'pressed'\">press</button>")

    def press(page):  # type: ignore[no-untyped-def]
        page.click("button")
        return page.inner_text("button")

    assert browser.visit(path, press) == "pressed"


@pytest.mark.parametrize(("size", "width"), [("phone", 390), ("desktop", 1280)])
def test_windows_have_their_sizes(browser: Browser, tmp_path: Path, size, width: int) -> None:  # type: ignore[no-untyped-def]
    assert browser.visit(write(tmp_path, GOOD), lambda page: page.evaluate("innerWidth"), size=size) == width


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("<script>console.error('it broke')</script>", "it broke"),
        ("<script>throw new Error('it fell')</script>", "it fell"),
        ("<script>setTimeout(() => { throw new Error('later') })</script>", "later"),
        ("<script>alert('look at me')</script>", "a dialogue: look at me"),
        ("<img src='https://example.org/x.png' alt='x'>", "it asked for https://example.org/x.png"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", "it asked for http://127.0.0.1:9/x"),
        ("<script>new WebSocket('ws://127.0.0.1:9/')</script>", "it asked for ws://127.0.0.1:9/"),
        ("<img src='other.png' alt='x'>", "other.png"),
    ],
)
def test_what_a_page_must_not_do_is_seen(browser: Browser, tmp_path: Path, body: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=r"page\.html") as found:
        browser.visit(write(tmp_path, GOOD + body), lambda page: page.wait_for_timeout(100))
    assert complaint in str(found.value)


def test_what_a_look_raises_is_raised_with_what_the_page_complained_of(browser: Browser, tmp_path: Path) -> None:
    def look(page):  # type: ignore[no-untyped-def]
        raise LookupError("nothing there")

    path = write(tmp_path, GOOD + "<script>console.error('it broke')</script>")
    with pytest.raises(LookupError, match="nothing there") as found:
        browser.visit(path, look)
    assert any("it broke" in note for note in found.value.__notes__)


def test_a_server_of_this_machine_may_be_asked_where_a_test_says_so(browser: Browser, server: str) -> None:
    assert browser.visit(server, lambda page: page.inner_text("h1"), loopback=True) == "served"
    with pytest.raises(Exception, match="ERR_FAILED"):
        browser.visit(server, lambda page: None)
    with pytest.raises(AssertionError, match=r"example\.org"):
        browser.visit(server, lambda page: page.evaluate("fetch('https://example.org').catch(() => 0)"), loopback=True)


def test_no_event_loop_runs_in_the_thread_of_a_test(browser: Browser, tmp_path: Path) -> None:
    browser.visit(write(tmp_path, GOOD), lambda page: None)

    async def answer() -> int:
        return 42

    assert asyncio.run(answer()) == 42


def test_a_closed_browser_leaves_no_process(tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with open_browser() as other:
        other.visit(write(tmp_path, GOOD), lambda page: None)
        during = {process.pid for process in psutil.Process().children(recursive=True)} - before
        assert len(during) > 2, "a driver and a browser of several processes"
    left = [pid for pid in during if psutil.pid_exists(pid)]
    assert all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in left)


def test_a_browser_that_cannot_start_leaves_no_process(tmp_path: Path) -> None:
    with open_browser():
        pass  # skipped where there is no driver
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(Exception, match="executable"):
        Browser(str(tmp_path / "chromium"))
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_good_page_breaks_no_law(browser: Browser, tmp_path: Path) -> None:
    path = write(tmp_path, f"{GOOD}<h2>More</h2><img src='{DOT}' width='40' height='40' alt='A dot'>")
    assert browser.visit(path, broken_laws, size="phone") == []


@pytest.mark.parametrize(
    ("body", "law"),
    [
        (f"{GOOD}<div style='width: 600px'>wide</div>", "the page scrolls sideways"),
        (f"{GOOD}<div style='width: 600px'>wide</div>", "the page is laid out for a screen of"),
        (f"{GOOD}<p style='position: absolute; left: -50px'>left</p>", "it leaves the page"),
        (f"{GOOD}<div style='overflow: auto'><p style='width: 600px'>w</p></div>", "a keyboard cannot reach it"),
        (f"{GOOD}<div style='overflow: hidden'><p style='width: 600px'>w</p></div>", "it is cut off"),
        (f"{GOOD}<p style='font-size: 9px'>tiny</p>", "text is tiny"),
        (f"{GOOD}<details><summary>more</summary><p style='font-size: 9px'>tiny</p></details>", "text is tiny"),
        (f"{GOOD}<p style='color: #999'>pale</p>", "text is pale"),
        (f"{GOOD}<img src='data:image/png;base64,AAAA' width='40' height='40' alt='x'>", "a picture did not load"),
        (f"{GOOD}<img src='{DOT}' width='40' height='40'>", "a picture says nothing"),
        (f"{GOOD}<img src='{DOT}' width='4' height='4' alt='x'>", "a picture is tiny"),
        (f"{GOOD}<svg></svg>", "a plot says nothing"),
        (
            f"{GOOD}<svg role='img' aria-label='x' viewBox='0 0 50 50'><text x='45' y='20'>cut</text></svg>",
            "text leaves its plot",
        ),
        (
            f"{GOOD}<svg role='img' aria-label='x' viewBox='0 0 350 90'>"
            "<text x='9' y='40'>one</text><text x='11' y='44'>two</text></svg>",
            "text lies on text",
        ),
        ("<h2>Second</h2>", "there is not one first heading"),
        (f"{GOOD}<h3>Third</h3>", "a heading of level 3 follows one of level 1"),
        (f"{GOOD}<table><tr><td>1</td></tr></table>", "a table has no header row"),
        (f"{GOOD}<table><thead><tr><th>1</th></tr></thead></table>", "a header cell heads nothing"),
        (f"{GOOD}<p id='a'>1</p><p id='a'>2</p>", "two elements have one id"),
        (f"{GOOD}<a href='#nowhere'>go</a>", "a link leads nowhere"),
        (f"{GOOD}<div role='region'>box</div>", "a region has no name"),
    ],
)
def test_every_broken_law_is_seen(browser: Browser, tmp_path: Path, body: str, law: str) -> None:
    found = browser.visit(write(tmp_path, body), broken_laws, size="phone")
    assert any(law in told for told in found), found
