"""`headstart serve`: what the page shows in a real browser, what its server refuses, and how it ends."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import headstart
from cache_schema.errors import UsageError
from evaluate.pictures import PREDICTED_COLOUR
from evaluate.predictor import open_image
from headstart import cli, serve
from headstart.serve_commands import Serve
from headstart.serve_gate import LOOPBACK_NAMES
from headstart.serve_limits import Limits
from headstart.served_heads import (
    ServedHeads,
)
from tests.browser import Browser, Size, open_browser
from tests.headstart.test_served_heads import HOSTILE, runs, scene
from tests.page_laws import broken_laws

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from heads.runs import Training

__all__ = ["runs", "scene"]  # fixtures of heads whose own tests make them

START_S, END_S = 120, 30


# A server


@dataclass
class Server:
    """The command in a process of its own, and where it said that it listens."""

    process: subprocess.Popen[str]
    address: str
    temporary: Path

    def ask(self, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address.rstrip("/") + path, data, named)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


def start(
    temporary: Path,
    *arguments: object,
    told: str = "stdout",
    program: tuple[str, ...] = ("-m", "headstart.cli"),
) -> Server:
    """Run `headstart serve` on any free port, and wait until it says where it is."""
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, *program, "serve", *map(str, arguments), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "GRADIO_ALLOWED_PATHS": "/"},
    )
    said = ""
    try:
        with selectors.DefaultSelector() as selector:
            stream = getattr(process, told)
            selector.register(stream, selectors.EVENT_READ)
            deadline = time.monotonic() + START_S
            while (found := re.search(r"at (http://\S+) until", said)) is None:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert selector.select(deadline - time.monotonic()), f"nothing was said in {START_S} s"
                said += stream.readline()
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return Server(process, found[1], temporary)


def end(server: Server, signal_number: int) -> tuple[int, str, str]:
    """Exit code and what was still said."""
    server.process.send_signal(signal_number)
    try:
        out, err = server.process.communicate(timeout=END_S)
    finally:
        server.process.kill()
        server.process.communicate()
    return server.process.returncode, out, err


@pytest.fixture(scope="module")
def server(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("gradio", reason='the page is made with Gradio: pip install "headstart[serve]"')
    server = start(tmp_path_factory.mktemp("serve") / "tmp", *runs)
    try:
        yield server
    finally:
        code, _, err = end(server, signal.SIGTERM)
    assert (code, err) == (cli.DONE, "headstart: ended.\n")
    assert list(server.temporary.iterdir()) == [], "uploads stay behind"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


# In a browser


def drop(page: Page, picture: Path) -> None:
    page.wait_for_selector("#picture input[type=file]", state="attached")
    page.set_input_files("#picture input[type=file]", picture)


def ask(page: Page, picture: Path, prompts: list[str]) -> None:
    """Drop a picture and ask about it, and wait for the answer."""
    drop(page, picture)
    page.wait_for_selector("#answer .hs-hint:has-text('Now say')")
    page.fill("#prompts textarea", "\n".join(prompts))
    page.click("#segment")
    page.wait_for_selector(f"#answer .hs-result:nth-of-type({len(prompts)})")


def choose(page: Page, run_dir: Path) -> None:
    page.get_by_label(run_dir.name).check()
    page.wait_for_selector(f"#answer .hs-note:has-text('{run_dir.name}')")


def shown_pictures(page: Page, selector: str) -> list[np.ndarray]:
    """The pixels of pictures as the browser has them, (H, W, 3) each."""
    found = page.evaluate(
        """async selector => Promise.all([...document.querySelectorAll(selector)].map(async image => {
            await image.decode();
            const canvas = document.createElement("canvas");
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL("image/png"); }))""",
        selector,
    )
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2])))).astype(int)[..., :3]
        for one in found
    ]


def texts(page: Page, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def distance_from_edge(mask: np.ndarray) -> np.ndarray:
    """How many pixels each pixel is from the nearest of the other side, up to 5."""
    found = np.full(mask.shape, 5)
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            near = mask[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5]
            if (near != mask[y, x]).any():
                rows, columns = np.nonzero(near != mask[y, x])
                away = np.maximum(abs(rows + max(0, y - 4) - y), abs(columns + max(0, x - 4) - x))
                found[y, x] = away.min()
    return found


def test_a_dropped_picture_and_prompts_give_the_masks_and_scores_of_the_predictor(
    server: Server, browser: Browser, runs: list[Path], scene: tuple[Path, list[str]]
) -> None:
    path, prompts = scene

    def use(page: Page) -> tuple[list[np.ndarray], list[str], list[str]]:
        ask(page, path, prompts)
        return shown_pictures(page, ".hs-mask"), texts(page, ".hs-prompt"), texts(page, ".hs-figures")

    pictures, names, figures = browser.visit(server.address, use, loopback=True)
    image = open_image(path).astype(int)
    tinted = image + 0.4 * (np.array(PREDICTED_COLOUR) - image)
    predictions = headstart.load(runs[0]).set_image(path).predict(prompts)
    assert names == prompts
    for shown, said, prediction in zip(pictures, figures, predictions, strict=True):
        assert shown.shape == image.shape
        clear = distance_from_edge(prediction.mask) > 4  # of outlines and what a JPEG blurs
        inside, outside = clear & prediction.mask, clear & ~prediction.mask
        assert inside.any()
        assert outside.any()
        assert abs(shown - tinted)[inside].mean() < 6
        assert abs(shown - image)[outside].mean() < 6
        assert abs(shown - image)[inside].mean() > 20, "the tint could not be told from the picture"
        assert said == f"mean probability {prediction.score:.2f} {prediction.mask.mean():.1%} marked"


def test_another_head_answers_about_the_same_picture_with_its_score_and_attention(
    server: Server, browser: Browser, runs: list[Path], scene: tuple[Path, list[str]]
) -> None:
    path, prompts = scene

    def use(page: Page) -> list[tuple[list[str], list[str], list[tuple[int, ...]]]]:
        ask(page, path, prompts)
        found = []
        for run_dir in (runs[0], runs[2], runs[1]):
            choose(page, run_dir)
            shapes = [picture.shape for picture in shown_pictures(page, ".hs-word img")]
            found.append((texts(page, ".hs-figures"), texts(page, ".hs-word"), shapes))
        return found

    pooled, judging, reading = browser.visit(server.address, use, loopback=True)
    assert pooled[1:] == ([], [])
    for run_dir, (figures, words, shapes), kind in (
        (runs[2], judging, "expected IoU"),
        (runs[1], reading, "mean probability"),
    ):
        predictions = headstart.load(run_dir).set_image(path).predict(prompts)
        expected = []
        for one in predictions:
            share = f"{one.mask.mean():.1%} marked" if one.mask.any() else "nothing marked"
            expected.append(f"{'no target ' if one.no_target else ''}{kind} {one.score:.2f} {share}")
        assert figures == expected
        assert [word.split()[0] for word in words] == " ".join(prompts).split()
        highest = [(word.max() / word.mean()) for one in predictions for word in one.attention]
        assert [float(word.split()[1]) for word in words] == pytest.approx(highest, abs=0.006)
        assert {max(shape) for shape in shapes} == {224}
    assert [one.no_target for one in predictions] == [None, None]


def test_a_file_that_is_no_picture_gives_one_sentence_and_leaves_the_page(
    server: Server, browser: Browser, scene: tuple[Path, list[str]], tmp_path: Path
) -> None:
    bad = tmp_path / "holiday.png"
    bad.write_bytes(b"no picture at all")

    def use(page: Page) -> tuple[list[str], list[str], str, int]:
        ask(page, *scene)
        page.click("#picture button[aria-label='Clear'], #picture button[aria-label='Remove Image']")
        page.wait_for_selector("#answer .hs-hint:has-text('Drop a picture first.')")
        drop(page, bad)
        page.wait_for_selector("#answer .hs-mistake")
        said, left = texts(page, "#answer [role=alert]"), texts(page, ".hs-result")
        page.wait_for_selector("#picture img", state="detached", timeout=5000)
        page.fill("#prompts textarea", "")
        drop(page, scene[0])
        page.wait_for_selector("#answer .hs-hint:has-text('Now say')")
        return said, left, page.inner_text("body"), page.locator("#answer [role=alert]").count()

    said, left, text, after = browser.visit(server.address, use, loopback=True)
    assert len(said) == 1
    assert said[0].startswith("holiday.png cannot be used: not an image file")
    assert left == []
    assert after == 0
    assert "Traceback" not in text
    assert str(server.temporary) not in text


def test_too_many_prompts_too_long_ones_and_none_are_answered_in_a_sentence(
    server: Server, browser: Browser, scene: tuple[Path, list[str]]
) -> None:
    path, prompts = scene

    def use(page: Page) -> list[str]:
        page.click("#segment")
        found = texts(page, "#answer .hs-message")
        ask(page, path, prompts)
        for text in ("\n".join(["a dog"] * 17), "x" * 301, " \n "):
            page.fill("#prompts textarea", text)
            page.click("#segment")
            page.wait_for_function(
                """said => { const now = document.querySelector("#answer .hs-message");
                    return now && now.innerText.trim() !== said; }""",
                arg=found[-1],
            )
            found += texts(page, "#answer .hs-message")
        return found

    assert browser.visit(server.address, use, loopback=True) == [
        "Drop a picture first.",
        "17 prompts are too many at once: leave 16 lines.",
        "a prompt has 301 letters: shorten it to 300.",
        "Now say what to segment, one prompt on each line.",
    ]


def test_a_prompt_that_means_harm_is_only_text(server: Server, browser: Browser, scene: tuple[Path, list[str]]) -> None:
    def use(page: Page) -> tuple[str, bool]:
        ask(page, scene[0], [HOSTILE, scene[1][0]])
        return page.locator(".hs-prompt").first.inner_text(), page.evaluate("'harmed' in window")

    assert browser.visit(server.address, use, loopback=True) == (HOSTILE, False)


@pytest.mark.parametrize("size", ["phone", "desktop"])
def test_our_part_of_the_page_breaks_no_law(
    server: Server, browser: Browser, runs: list[Path], scene: tuple[Path, list[str]], size: Size
) -> None:
    """What Gradio draws, its icons and what it calls its parts, is not ours to judge."""

    def use(page: Page) -> list[str]:
        ask(page, *scene)
        choose(page, runs[1])
        return broken_laws(page)

    found = browser.visit(server.address, use, size=size, loopback=True)
    theirs = re.compile(r"a plot says nothing: <svg|two elements have one id$|it is cut off: <div sr-only> \"Loading\"")
    assert [law for law in found if not theirs.match(law)] == []


def test_a_file_beyond_the_limit_is_refused_before_it_is_sent(server: Server, browser: Browser, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (8, 8)).save(large)
    with large.open("ab") as file:
        file.truncate(20 * 2**20 + 1)

    def use(page: Page) -> tuple[str, list[str]]:
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
        drop(page, large)
        return page.wait_for_selector("[data-testid=toast-body]").inner_text(), sent

    said, sent = browser.visit(server.address, use, loopback=True)
    assert "maximum allowed size of 20" in said
    assert sent == []


# Its server


def test_no_file_of_the_machine_can_be_fetched_or_asked_about(
    server: Server, scenes_root: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    inside = next(server.temporary.glob("headstart-serve-*"))
    paths = ["/etc/passwd", str(secret), f"{inside}/../../{secret.name}", "http://127.0.0.1:9/", str(inside)]
    for path in paths:
        assert server.ask(f"/gradio_api/file={path}")[0] in (403, 404), path
        question = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, "a dog", ""], "fn_index": 0}
        body = json.dumps({**question, "session_hash": "x"}).encode()
        if path != str(inside):
            status, said = server.ask("/gradio_api/queue/join", body, Content_Type="application/json")
            assert (status, said) == (403, b"Only uploaded files may be asked about."), path


def upload(server: Server, content: bytes) -> Path:
    """Where a file that is uploaded lies."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    status, said = server.ask("/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x")
    assert status == 200
    (path,) = map(Path, json.loads(said))
    assert path.is_relative_to(server.temporary)
    return path


def test_what_was_uploaded_can_be_fetched_again_and_nothing_else_is_kept(server: Server) -> None:
    path = upload(server, b"some bytes")
    assert server.ask(f"/gradio_api/file={path}") == (200, b"some bytes")


IMPATIENT = """
import sys
from headstart import cli, serve

def mount_impatient(*arguments, mount=serve._mount_page):
    from headstart import serve_page
    serve_page._TIDY_S, serve_page._KEEP_S = 0.05, 0.01
    return mount(*arguments)

serve._mount_page = mount_impatient
sys.exit(cli.main())
"""
"""The command, where uploads are looked through many times a second and none may become older than a moment."""


def test_uploads_are_deleted_when_they_are_old(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the page is made with Gradio: pip install "headstart[serve]"')
    impatient = start(tmp_path / "tmp", runs[0], program=("-c", IMPATIENT))
    try:
        path = upload(impatient, b"some bytes")
        deadline = time.monotonic() + 60
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not path.exists()
        assert impatient.ask(f"/gradio_api/file={path}")[0] in (403, 404)
    finally:
        code, _, _ = end(impatient, signal.SIGTERM)
    assert code == cli.DONE


@pytest.mark.parametrize(
    "path",
    [
        "/docs",
        "/openapi.json",
        "/monitoring",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/mcp",
        "/gradio_api/deep_link",
    ],
)
def test_doors_of_gradio_that_the_page_does_not_need_are_shut(server: Server, path: str) -> None:
    assert server.ask(path)[0] == 404


def test_the_page_may_ask_its_own_server_only(server: Server) -> None:
    with urllib.request.urlopen(server.address, timeout=30) as answer:
        policy = answer.headers["Content-Security-Policy"]
        text = answer.read().decode()
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert '"analytics_enabled":false' in text.replace(" ", "")


def test_ctrl_c_ends_it_and_json_says_what_was_served(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the page is made with Gradio: pip install "headstart[serve]"')
    server = start(tmp_path / "tmp", runs[1], "--json", told="stderr")
    with urllib.request.urlopen(server.address + "gradio_api/heartbeat/someone", timeout=30):  # a page that is open
        code, out, err = end(server, signal.SIGINT)
    assert (code, err) == (cli.DONE, "headstart: ended.\n")
    assert json.loads(out) == {
        "address": server.address,
        "is_local": True,
        "heads": [{"name": runs[1].name, "has_attention": True}],
    }
    assert list(server.temporary.iterdir()) == []


# The command


def mistake(**options: Any) -> str:
    with pytest.raises(UsageError) as found:
        Serve(**{"runs": (), "port": 0, **options}).run()
    return str(found.value)


def test_mistakes_are_told_in_a_sentence(tmp_path: Path, run: Training) -> None:
    pytest.importorskip("gradio", reason='the page is made with Gradio: pip install "headstart[serve]"')
    assert "there is no run to serve" in mistake()
    assert "not a run folder" in mistake(runs=(tmp_path,))
    assert "a port is from 0 to 65535" in mistake(port=65536)
    assert "a file has more than 0 MB" in mistake(max_file_mb=0)
    assert "leave --host out" in mistake(host="no-such-host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot be served at 127.0.0.1, port {port} (Address already in use)" in mistake(port=port)


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "headstart[serve]"' in mistake()


def test_others_are_warned_of_where_they_can_reach_the_page(
    run: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", reason='the page is made with Gradio: pip install "headstart[serve]"')
    names: list[Any] = []

    def pretend(heads: ServedHeads, listening: Any, uploads: Path, known: Any, limits: Limits, announce: Any) -> None:
        names.append(known)
        announce()

    monkeypatch.setattr(serve, "_run", pretend)
    result = Serve(runs=(run.run_dir,), port=0, host="0.0.0.0").run()
    assert not result["is_local"]
    assert "warning: whoever reaches 0.0.0.0 can use this page" in capsys.readouterr().err
    assert Serve(runs=(run.run_dir,), port=0).run()["is_local"]
    assert "warning" not in capsys.readouterr().err
    assert names == [None, LOOPBACK_NAMES]
