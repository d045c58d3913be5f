"""Serves the page of running trainings, to this machine only. It answers two addresses, and changes nothing."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moetool import __version__
from moetool.errors import ConfigError
from moetool.watch.page import collect, document_json, render
from moetool.watch.problem import in_words
from moetool.watch.run import WatchedRun

HOST = "127.0.0.1"
PORTS = range(8130, 8150)  # one that is free is taken
EVERY = 2000  # milliseconds between two requests of the page
_LOOK = 1.0  # seconds between two looks at the files
_AGAIN = 15.0  # seconds after which a document is made anew without new rows: a run may have stopped


Scores = Callable[[], tuple[list[dict[str, Any]], list[str]]]  # see `read_scores`


class Watcher:
    """Looks at the runs' files, and keeps their newest document.

    Attributes:
        version: of the document; another one after each change.
        document: the newest.
        text: the same as a JSON text.
    """

    def __init__(self, runs: Sequence[WatchedRun], scores: Scores = lambda: ([], [])) -> None:
        self._runs, self._scores = runs, scores
        self.version = 0
        for run in runs:
            run.sample()
            if not run.sampled:
                run.refresh()
        self._stale = any(run.sampled for run in runs)
        self.make()

    def make(self) -> None:
        """Make the document of what was read."""
        began = time.monotonic()
        try:
            scores, problems = self._scores()
        except Exception as error:
            scores, problems = [], [f"scores: {in_words(error)}"]
        self._show(collect(self._runs, scores, problems))
        self._made = time.monotonic()
        self._cost = self._made - began

    def _show(self, document: dict[str, Any]) -> None:
        text = document_json(document, EVERY, self.version + 1)
        self.document, self.text, self.version = document, text, self.version + 1

    def look(self) -> None:
        """Read what is new; at most a tenth of the time goes into new documents."""
        new = [run.refresh() for run in self._runs]
        self._stale = self._stale or any(new)
        waited = time.monotonic() - self._made
        if (self._stale and waited > 10 * self._cost) or waited > _AGAIN:
            self.make()
            self._stale = False

    def run(self, stop: threading.Event) -> None:
        """Look again and again until told to stop. After an error, the page keeps its numbers and says why."""
        while not stop.wait(_LOOK):
            try:
                self.look()
            except Exception as error:
                self._made = time.monotonic()
                with suppress(Exception):
                    if (said := in_words(error)) not in self.document["problems"]:
                        self._show(self.document | {"problems": [*self.document["problems"], said]})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    watcher: Watcher


class _Handler(BaseHTTPRequestHandler):
    """Answers GET / and GET /runs.json, and everything else with 404 or 403."""

    server: _Server
    server_version, sys_version = f"moetool/{__version__}", ""
    timeout = 30

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        # A page of another site that has bound its name to this address sends that name.
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self._answer(403, "text/plain", b"open the address that moetool watch has printed\n")
            return
        path, _, query = self.path.partition("?")
        watcher = self.server.watcher
        if path == "/" and not query:
            page = render(watcher.document, EVERY, watcher.version).encode("utf-8", "replace")
            self._answer(200, "text/html; charset=utf-8", page)
        elif path == "/runs.json":
            if query == f"have={watcher.version}":
                self._answer(204, "application/json", b"")
            else:
                self._answer(200, "application/json", watcher.text.encode())
        else:
            self._answer(404, "text/plain", b"there is / and /runs.json\n")

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def serve(watcher: Watcher, port: int | None, ready: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Args:
        watcher: of the runs.
        port: to listen on; None takes one of PORTS.
        ready: gets the page's address once it answers.

    Raises:
        ConfigError: the port is taken.
    """
    server = _bind(port)
    server.watcher = watcher
    stop = threading.Event()
    looking = threading.Thread(target=watcher.run, args=(stop,), daemon=True)
    looking.start()
    try:
        ready(f"http://{HOST}:{server.server_address[1]}/")
        server.serve_forever()
    finally:
        stop.set()
        server.server_close()


def _bind(port: int | None) -> _Server:
    for candidate in PORTS if port is None else [port]:
        try:
            return _Server((HOST, candidate), _Handler)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    which = f"port {port}" if port is not None else f"ports {PORTS[0]} to {PORTS[-1]}"
    raise ConfigError(f"{which}: taken, or not yours to use; give another --port")
