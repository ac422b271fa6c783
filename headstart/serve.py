"""Trained heads on a web page of this machine, until Ctrl-C or SIGTERM.

Loopback by default. Nothing of Gradio's that asks other machines is on: no analytics, no tunnel, no fonts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cache_schema.errors import UsageError
from headstart.serve_gate import LOOPBACK_NAMES, Gate
from headstart.serve_limits import Limits
from headstart.served_heads import ServedHeads, load_served_heads

_GRACE_S = 2
"""How long open connections are waited for at the end."""


def serve(
    run_dirs: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_file_mb: float = 20,
    device: str = "auto",
) -> dict[str, Any]:
    """Serve runs until interrupted or terminated, and say where.

    Args:
        port: 0 takes any that is free.
        max_file_mb: the largest picture file that may be uploaded, in megabytes of 2**20 bytes, as Gradio counts.

    Returns:
        The address, whether others than this machine can reach it, and the heads.

    Raises:
        UsageError: Gradio is not installed, the place is taken or none of this machine's, or a run cannot be loaded.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('the page is made with Gradio, which is not installed: pip install "headstart[serve]".')
    if not 0 <= port <= 65535 or not 0 < max_file_mb <= 1000:
        raise UsageError(
            f"port {port} or {max_file_mb} MB cannot be: a port is from 0 to 65535, and a file has more than 0 MB and "
            "no more than 1000."
        )
    with _listen(host, port) as listening:
        bound, port = listening.getsockname()[:2]
        is_local = ipaddress.ip_address(bound.partition("%")[0]).is_loopback
        shown = host if host not in ("0.0.0.0", "::") else "localhost"  # noqa: S104  named, not bound
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
        heads = load_served_heads(run_dirs, device)

        def announce() -> None:
            print(f"headstart serves {', '.join(heads.names)} at {address} until Ctrl-C.", flush=True)
            if not is_local:
                print(
                    f"warning: whoever reaches {host} can use this page, without a password and unencrypted; leave "
                    "--host out to keep it to this machine.",
                    file=sys.stderr,
                )

        with _own_gradio() as uploads, contextlib.suppress(KeyboardInterrupt):  # SIGTERM comes as one, too
            names = LOOPBACK_NAMES | {host.lower()} if is_local else None
            _run(heads, listening, uploads, names, Limits(max_file_bytes=int(max_file_mb * 2**20)), announce)
    print("headstart: ended.", file=sys.stderr)
    return {"address": address, "is_local": is_local, "heads": heads.describe()}


def _run(
    heads: ServedHeads,
    listening: socket.socket,
    uploads: Path,
    names: frozenset[str] | None,
    limits: Limits,
    announce: Callable[[], None],
) -> None:
    """Answer requests until a signal comes, which is raised when every connection is closed.

    Args:
        names: hosts that requests may name; None lets any.
        announce: called when the first request can be answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                announce()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """Close a page's streams, which never end by themselves, without a word about each."""
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    gate = Gate(_mount_page(heads, limits, uploads), names=names, uploads=uploads, max_file_bytes=limits.max_file_bytes)
    config = uvicorn.Config(
        gate,
        log_level="warning",
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = Server(config)
    server.run(sockets=[listening])
    if not server.started:
        raise RuntimeError("the page's server did not start; what it said stands above")


def _mount_page(heads: ServedHeads, limits: Limits, uploads: Path) -> Any:
    """The page as an ASGI application, with nothing of Gradio's and FastAPI's that it can do without."""
    import gradio
    from fastapi import FastAPI

    from headstart.serve_page import PAGE_STYLE, make_page, make_theme

    return gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        make_page(heads, limits, uploads),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.max_file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=make_theme(),
        css=PAGE_STYLE,
    )


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.create_server(place[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        reason = error if number is None or number < 0 else os.strerror(number)  # negative where a name is not known
        raise UsageError(
            f"the page cannot be served at {host}, port {port} ({reason}); choose another with --port, 0 for any that "
            "is free, or leave --host out."
        ) from error
    with listening:
        yield listening


@contextlib.contextmanager
def _own_gradio() -> Iterator[Path]:
    """A folder for uploads that goes when the context ends, and Gradio set up to use it, whatever the environment says.

    Gradio reads some of these as it is imported.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("GRADIO_")}
    for name in before:
        del os.environ[name]
    try:
        with tempfile.TemporaryDirectory(prefix="headstart-serve-") as folder:
            uploads = Path(folder).resolve()
            os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(uploads))
            yield uploads
    finally:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
            os.environ.pop(name, None)
        os.environ.update(before)
