"""A hub of our own: serves folders as the models, data sets and metrics of huggingface.co, for the real clients."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client, `datasets` and `evaluate` ask for. ROOT/OWNER/NAME is a repository."""

    root: Path
    asked: list[tuple[str, int]]

    def log_message(self, *_: object) -> None:
        """No log."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}"))

    def answer(self, body: Any = None) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"(?:/datasets|/spaces)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file = self.root / match[1] / match[2]
            if file.is_file():
                return self.send(file.read_bytes(), str(file))
            if file.parent.is_dir():
                return self.refuse("EntryNotFound")
        elif match := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/([^/]+)/[^/]+(?:/(.+))?)?", path):
            repository, what, folder = match.groups()
            entries = self.entries(self.root / repository)
            if entries and what in (None, "revision"):
                siblings = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
                return self.send_json({"id": repository, "sha": COMMIT, "siblings": siblings})
            if entries and what == "paths-info":
                return self.send_json([entry for entry in entries if entry["path"] in body["paths"]])
            if entries and what == "tree":
                return self.send_json([e for e in entries if not folder or e["path"].startswith(f"{folder}/")])
        return self.refuse("RepoNotFound")

    def entries(self, folder: Path) -> list[dict[str, Any]]:
        return [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(folder)),
                "size": path.stat().st_size if path.is_file() else 0,
                "oid": COMMIT,
            }
            for path in sorted(folder.rglob("*"))
        ]

    def send_json(self, document: Any) -> None:
        self.send(json.dumps(document).encode(), "api", "application/json")

    def send(self, data: bytes, name: str, kind: str = "application/octet-stream") -> None:
        whole, headers = len(data), {"ETag": f'"{abs(hash(name))}"', "X-Repo-Commit": COMMIT, "Content-Type": kind}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")):
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
            headers["Content-Range"] = f"bytes {wanted[1]}-{int(wanted[1]) + len(data) - 1}/{whole}"
        self.asked.append((name, len(data) if self.command != "HEAD" else 0))
        self.send_response(206 if wanted else 200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.asked.append((self.path, 0))
        self.send_response(404)
        for key, value in {"X-Error-Code": code, "X-Repo-Commit": COMMIT, "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()


@contextmanager
def served(root: Path, home: Path) -> Iterator[tuple[dict[str, str], list[tuple[str, int]]]]:
    """Serve ROOT; give the environment for a process that uses it (cache HOME), and what was asked and bytes sent."""
    asked: list[tuple[str, int]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("One", (Hub,), {"root": root, "asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_TOKEN": ""}, asked
    finally:
        server.shutdown()
        server.server_close()


def save_dataset(root: Path, name: str, config: str, splits: dict[str, list[dict[str, Any]]]) -> None:
    """A data set as JSONL; its configurations are listed in README.md, as on the hub."""
    folder = root / name
    (folder / config).mkdir(parents=True)
    for split, rows in splits.items():
        (folder / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs = [
        {
            "config_name": place.name,
            "data_files": [{"split": f.stem, "path": f"{place.name}/{f.name}"} for f in sorted(place.iterdir())],
        }
        for place in sorted(folder.iterdir())
        if place.is_dir()
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
