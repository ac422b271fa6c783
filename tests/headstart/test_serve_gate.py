"""The gate before the page's server: who gets in, and with what."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headstart.serve_gate import LOOPBACK_NAMES, NUM_FILES_KEPT, Gate


@dataclass
class Inside:
    """An application that notes who got in, and reads what they bring."""

    reached: int = 0
    body: bytes | None = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.reached += 1
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.body = None
                return
            assert self.body is not None
            self.body += message["body"]
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})


def knock(
    path: str,
    method: str = "GET",
    body: bytes = b"",
    *,
    names: frozenset[str] | None = LOOPBACK_NAMES,
    uploads: Path = Path("/up"),
    **headers: str,
) -> tuple[int | None, Inside]:
    """Status, or None where the connection was dropped, and what came in. A body comes in pieces of 1000 bytes."""
    inside, sent = Inside(), []
    gate = Gate(inside, names=names, uploads=uploads, max_file_bytes=50_000)
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)] or [b""]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:7860", **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }
    asyncio.run(gate(scope, receive, send))
    if not sent:
        return None, inside
    assert {name for name, _ in sent[0]["headers"]} >= {b"content-security-policy", b"x-content-type-options"}
    return sent[0]["status"], inside


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:7860", 200),
        ("localhost:9000", 200),
        ("[::1]:7860", 200),
        ("LocalHost", 200),
        ("evil.example", 421),
        ("evil.example:7860", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_a_server_on_loopback_answers_to_names_of_this_machine_only(host: str, status: int) -> None:
    found, inside = knock("/", host=host)
    assert found == status
    assert inside.reached == (status == 200)
    assert knock("/", host=host, names=None)[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:7860", 200),
        ("http://localhost:7860", 403),
        ("http://127.0.0.1:9", 403),
        ("null", 403),
        ("http://[", 403),
        ("http://evil.example", 403),
    ],
)
def test_pages_of_other_sites_may_not_ask(origin: str, status: int) -> None:
    assert knock("/gradio_api/cancel", "POST", b"{}", origin=origin)[0] == status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=/up/a/b.png", 200),
        ("/gradio_api/file=/up/../etc/passwd", 404),
        ("/gradio_api/file=/upper/a", 404),
        ("/gradio_api/file=/etc/passwd", 404),
        ("/gradio_api/file=http://x/", 404),
        ("/assets/a.js", 200),
        ("/theme.css", 200),
        ("/gradio_api/component_server", 404),
        ("/gradio_api/run/0", 404),
    ],
)
def test_only_what_the_page_needs_is_there(path: str, status: int) -> None:
    assert knock(path)[0] == status


@pytest.mark.parametrize(
    ("path", "num_bytes", "told", "status"),
    [
        ("upload", 60000, True, 200),
        ("upload", 60001, True, 413),
        ("upload", 60000, False, 200),
        ("upload", 60001, False, None),
        ("cancel", 256001, True, 413),
        ("cancel", 256001, False, 413),
    ],
)
def test_what_is_too_large_is_not_read_to_its_end(path: str, num_bytes: int, told: bool, status: int | None) -> None:
    body = b'"' + b"x" * (num_bytes - 2) + b'"'
    headers = {"content_length": str(num_bytes)} if told else {}
    found, inside = knock(f"/gradio_api/{path}", "POST", body, **headers)
    assert found == status
    assert inside.body == (body if status == 200 else None if status is None else b"")


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"data": [{"path": "/up/a.png"}]}, 200),
        ({"data": [None, "a dog"]}, 200),
        ({"data": [{"path": "/etc/passwd"}]}, 403),
        ({"data": [[{"x": {"path": "http://evil.example/"}}]]}, 403),
        ({"data": [{"path": "/up/../etc/passwd"}]}, 403),
        ({"data": [{"path": ["/up/a.png"]}]}, 403),
    ],
)
def test_questions_name_uploads_and_no_other_files(asked: Any, status: int) -> None:
    body = json.dumps(asked).encode()
    found, inside = knock("/gradio_api/queue/join", "POST", body)
    assert found == status
    assert inside.body == (body if status == 200 else b"")


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_questions_that_are_no_json_are_refused(body: bytes) -> None:
    assert knock("/gradio_api/queue/join", "POST", body)[0] == 400


def test_an_upload_that_is_asked_after_is_done() -> None:
    status, inside = knock("/gradio_api/upload_progress")
    assert (status, inside.reached) == (200, 0)


def test_uploads_are_refused_while_the_folder_has_no_room_for_a_largest_one(tmp_path: Path) -> None:
    kept = tmp_path / "0123" / "a.png"
    kept.parent.mkdir()
    kept.write_bytes(b"x" * (NUM_FILES_KEPT - 1) * 50_000)
    assert knock("/gradio_api/upload", "POST", b"x", uploads=tmp_path)[0] == 200
    (tmp_path / "4567").mkdir()
    (tmp_path / "4567" / "b.png").write_bytes(b"x")
    status, inside = knock("/gradio_api/upload", "POST", b"x", uploads=tmp_path)
    assert (status, inside.reached) == (507, 0)
    assert knock("/gradio_api/cancel", "POST", b"{}", uploads=tmp_path)[0] == 200
    assert knock("/", uploads=tmp_path)[0] == 200
    kept.unlink()
    assert knock("/gradio_api/upload", "POST", b"x", uploads=tmp_path)[0] == 200


def test_what_an_upload_that_was_cut_off_leaves_goes_and_whole_ones_stay(tmp_path: Path) -> None:
    whole = tmp_path / "0123" / "a.png"
    whole.parent.mkdir()
    whole.touch()
    (tmp_path / "tmpabc").touch()
    assert knock("/gradio_api/upload", "POST", b"x" * 60_001, uploads=tmp_path)[0] is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [whole]


def test_room_is_kept_for_uploads_on_their_way(tmp_path: Path) -> None:
    """At once, with nothing in the folder yet: as many come in as have room, and when they are through the next do."""
    statuses: list[int] = []
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [(b"host", b"localhost")]}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def knock_together() -> None:
        go_on = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await go_on.wait()
            return {"type": "http.request", "body": b"x", "more_body": False}

        gate = Gate(Inside(), names=LOOPBACK_NAMES, uploads=tmp_path, max_file_bytes=50_000)
        waiting = [asyncio.create_task(gate(scope, receive, send)) for _ in range(NUM_FILES_KEPT + 3)]
        while len(statuses) < 3:
            await asyncio.sleep(0)
        assert statuses == [507] * 3
        go_on.set()
        await asyncio.gather(*waiting)
        await gate(scope, receive, send)

    asyncio.run(asyncio.wait_for(knock_together(), 60))
    assert statuses == [507] * 3 + [200] * (NUM_FILES_KEPT + 1)
