"""The report of a run that goes on, served to this machine's browsers, and made anew when there is something new."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from crossdock.tools.report.document import document
from crossdock.tools.report.events import EVENTS_FILE
from crossdock.tools.report.load import LOAD_FILE, RANK_LOAD_FILE
from crossdock.tools.report.records import FAULTS_FOLDER, METRICS_FILE, ReportError
from crossdock.tools.report.report import render

__all__ = ["LiveReport", "serve"]

HOST = "127.0.0.1"
# Names by which a browser on this machine asks. A page from elsewhere whose own name leads here would ask by that.
_OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")
_WATCHED = (METRICS_FILE, LOAD_FILE, RANK_LOAD_FILE, EVENTS_FILE, "config.toml", FAULTS_FOLDER)
# Between a browser's looks.
SECONDS = 2.0
# A page is made for so small a share of the time.
_SHARE = 0.1

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class LiveReport:
    """A WSGI application: the report at `/`, with a tag, by which a browser learns that nothing is new.

    Args:
        folders: of the runs, one or more; they must exist, the runs need not have begun.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._lock = threading.Lock()
        self._tag, self._html = "", b""
        self._not_before = 0.0

    def __call__(self, environment: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        host = environment.get("HTTP_HOST", "")
        if host.rpartition(":")[0] not in _OWN_NAMES and host not in _OWN_NAMES:
            return _answer(start_response, "403 Forbidden", b"this server answers to 127.0.0.1 and localhost alone\n")
        if environment["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(start_response, "405 Method Not Allowed", b"GET alone\n")
        if environment.get("PATH_INFO", "/") != "/":
            return _answer(start_response, "404 Not Found", b"the report is at /\n")
        tag, html = self._current()
        headers = [("ETag", tag), ("Cache-Control", "no-store")]
        if environment.get("HTTP_IF_NONE_MATCH") == tag:
            start_response("304 Not Modified", headers)
            return []
        return _answer(start_response, "200 OK", html, "text/html; charset=utf-8", headers)

    def _current(self) -> tuple[str, bytes]:
        """The tag and the page of what the folders hold; for a while the last ones, where making them takes long."""
        with self._lock:
            tag = self._look()
            if tag != self._tag and time.monotonic() >= self._not_before:
                started = time.monotonic()
                self._html = self._make((tag, SECONDS)).encode()
                self._tag = tag
                ended = time.monotonic()
                self._not_before = ended + (ended - started) * (1 / _SHARE - 1)
            return self._tag, self._html

    def _look(self) -> str:
        """A digest of names, sizes and times of all files that the page is made of."""
        state = []
        for folder in self._folders:
            for path in (folder / name for name in _WATCHED):
                try:
                    status = path.stat()
                except OSError:
                    continue
                state.append((str(path), status.st_size, status.st_mtime_ns))
        return f'"{hashlib.sha256(repr(state).encode()).hexdigest()[:32]}"'

    def _make(self, live: tuple[str, float]) -> str:
        try:
            return render(self._folders, live)
        except ReportError as error:
            # Most likely no step is done yet.
            names = ", ".join(folder.absolute().name for folder in self._folders)
            content = f'<header><h1>{escape(names)}</h1></header><p class="quiet">{escape(str(error))}</p>'
            return document(names, content, (0, 0), live=live)


def serve(folders: Sequence[Path], port: int, started: Callable[[str], None]) -> None:
    """Serve the report of `folders` on this machine's loopback address until Ctrl-C.

    Args:
        folders: of runs.
        port: to listen on; 0 for any that is free.
        started: is told the address.

    Raises:
        ReportError: for a folder that does not exist, a port that is taken, or without the package `waitress`.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder} is no folder; name a run's, such as runs/debug/20261121-101622")
    if find_spec("waitress") is None:
        raise ReportError("--watch needs the package waitress, which is not installed: pip install 'crossdock[watch]'")
    from waitress.server import create_server

    try:
        listening = socket.create_server((HOST, port))
    except OSError as error:
        raise ReportError(
            f"--port {port} cannot be listened on: {error.strerror or error}; 0 takes any that is free"
        ) from None
    server = create_server(LiveReport(folders), sockets=[listening], ident=None, threads=2)
    started(f"http://{HOST}:{listening.getsockname()[1]}/")
    try:
        server.run()
    finally:
        server.close()


def _answer(
    start_response: StartResponse,
    status: str,
    body: bytes,
    kind: str = "text/plain; charset=utf-8",
    headers: Sequence[tuple[str, str]] = (),
) -> list[bytes]:
    own = [("Content-Type", kind), ("Content-Length", str(len(body))), ("X-Content-Type-Options", "nosniff")]
    start_response(status, [*own, *headers])
    return [body]
