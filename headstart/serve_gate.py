"""The gate before a page's server: it lets through what the page needs, for those it is meant for, and nothing else.

Gradio's server has more doors than one page needs: it fetches addresses for visitors, tells of its functions, passes
requests on. Whatever is not named here is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names by which a browser on this machine asks for a server on it."""

_READ = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static|svelte)/.*"
    r"|/gradio_api/(heartbeat/\w+|queue/data|startup-events|app_id/?|theme\.css)"
)
_UPLOAD, _FILE = "/gradio_api/upload", "/gradio_api/file="
_PROGRESS = "/gradio_api/upload_progress"
"""Where a page asks how far an upload is. It is told that it is done: Gradio would answer that an upload which the page
itself refused is not found, which browsers report as an error.
"""
_WRITTEN = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset")

_MAX_QUESTION_BYTES = 256_000
"""The longest request that is no upload."""

_MULTIPART_BYTES = 10_000
"""What an upload has around its file, at most."""

NUM_FILES_KEPT = 50
"""How many of the largest files the uploads may be together."""

_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""What a browser lets the page do: it may ask this server only. Gradio's own script is written into its page."""

_HEADERS = [
    (b"content-security-policy", _POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Gate:
    """An ASGI application before another.

    Args:
        names: hosts that requests may name, so that no other site's name can be pointed at this server; None lets any.
        uploads: the only folder of which files may be fetched. An upload is refused where it could bring what lies
            there, and what is on its way, to more than `NUM_FILES_KEPT` times the largest file.
        max_file_bytes: the largest file that may be uploaded.
    """

    def __init__(self, app: App, *, names: frozenset[str] | None, uploads: Path, max_file_bytes: int) -> None:
        self._app = app
        self._names = names
        self._folder = uploads
        self._uploads = f"{uploads}/"
        self._num_arriving = 0
        self._max_file_bytes = max_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self._refuse(scope)
            if refusal is not None:
                await _answer(send, *refusal)
            elif scope["path"] == _PROGRESS:
                await _answer(send, 200, 'data: {"msg": "done"}\n\n', "text/event-stream")
            elif scope["method"] == "POST" and scope["path"] == _UPLOAD:
                await self._take(scope, receive, send)
            elif scope["method"] == "POST":
                await self._ask(scope, receive, send)
            else:
                await self._let_through(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, if a request is not to be let through."""
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._names is not None and _host_name(host) not in self._names:
            return 421, "This server is not known by that name."
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "Requests from other sites are refused."
        path, method = scope["path"], scope["method"]
        if method in ("GET", "HEAD"):
            known = path == _PROGRESS or _READ.fullmatch(path) or self._is_upload(path)
            return None if known else (404, "There is nothing here.")
        if method != "POST" or path not in (_UPLOAD, *_WRITTEN):
            return 404, "There is nothing here."
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self._limit(path):
            return 413, "That is too large."
        return None

    def _is_upload(self, path: str) -> bool:
        return path.startswith(_FILE) and self._lies_inside(path.removeprefix(_FILE))

    def _lies_inside(self, path: object) -> bool:
        return isinstance(path, str) and path.startswith(self._uploads) and ".." not in path.split("/")

    def _limit(self, path: str) -> int:
        return self._max_file_bytes + _MULTIPART_BYTES if path == _UPLOAD else _MAX_QUESTION_BYTES

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an upload through while there is room for it, and for those on their way, at their largest."""
        room = NUM_FILES_KEPT * self._max_file_bytes - _num_bytes(self._folder)
        if room < (self._num_arriving + 1) * self._max_file_bytes:
            await _answer(send, 507, "Too many pictures were uploaded lately; try again when older ones are deleted.")
            return
        self._num_arriving += 1
        try:
            await self._let_through(scope, receive, send)
        finally:
            self._num_arriving -= 1
            if self._num_arriving == 0:
                _delete_parts(self._folder)

    async def _ask(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a question through whose files are uploads. Others Gradio would look for, or fetch from their address."""
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > _MAX_QUESTION_BYTES:
                await _answer(send, 413, "That is too large.")
                return
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            await _answer(send, 400, "That is no JSON.")
            return
        if not all(self._lies_inside(path) for path in _paths_in(asked)):
            await _answer(send, 403, "Only uploaded files may be asked about.")
            return
        replayed = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._let_through(scope, replay, send)

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._limit(scope["path"])

        async def receive_some() -> MutableMapping[str, Any]:
            """A body without a length in its header is cut off where it grows too long."""
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self._app(scope, receive_some, send_guarded)


def _delete_parts(folder: Path) -> None:
    """Delete what uploads that were cut off leave: files in the folder itself. Whole ones lie in folders below it.

    Gradio forgets them, so that they would never go.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file():
            path.unlink(missing_ok=True)


def _num_bytes(folder: Path) -> int:
    """What the files in a folder and below it have together."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += Path(parent, name).lstat().st_size
    return total


def _paths_in(asked: Any) -> Iterator[object]:
    """Whatever is called a path in plain JSON, however deep."""
    left = [asked]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if "path" in one:
                yield one["path"]
            left += one.values()
        elif isinstance(one, list):
            left += one


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port and the brackets of IPv6."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _answer(send: Send, status: int, said: str, kind: str = "text/plain") -> None:
    body = said.encode("ascii")
    headers = [
        (b"content-type", kind.encode("ascii")),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"connection", b"close"),
        *_HEADERS,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
