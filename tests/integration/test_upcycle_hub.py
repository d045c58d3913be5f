"""`--plan` of a hub model reads configuration and headers only; told by a small hub of our own."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import tiny

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for a snapshot and for headers."""

    root: Path
    sent: dict[str, int]

    def log_message(self, *_: object) -> None:
        """No log."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        names = sorted(p.name for p in self.root.iterdir())
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": n, "size": (self.root / n).stat().st_size, "oid": COMMIT} for n in names
            ]
            return self.send(json.dumps(entries).encode(), body)
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in names]
            info = {"id": "them/dense", "modelId": "them/dense", "sha": COMMIT, "siblings": siblings}
            return self.send(json.dumps(info).encode(), body)
        match = re.fullmatch(r"/them/dense/resolve/[^/]+/(.+)", path)
        if not match or not (self.root / match[1]).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.send((self.root / match[1]).read_bytes(), body, match[1])

    def send(self, data: bytes, body: bool, name: str = "") -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        whole = len(data)
        if wanted:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(data) - 1}/{whole}")
        for key, value in {"ETag": f'"{name or "api"}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.sent[name] = self.sent.get(name, 0) + len(data)
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    handler = type("One", (Hub,), {"root": tmp_path / "hub", "sent": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    yield handler, {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": ""}
    server.shutdown()


@pytest.mark.parametrize("shards", [1, 3])
def test_a_plan_of_a_hub_model_reads_no_weights(
    hub: tuple[type[Hub], dict[str, str]], shards: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    handler, env = hub
    dense = tiny.save_llama(tmp_path / "hub", hidden_size=128, intermediate_size=512, vocab_size=3000)
    if shards > 1:
        (dense / "model.safetensors").rename(tmp_path / "away.safetensors")
        (dense / "config.json").read_text()
        (tmp_path / "whole").mkdir()
        (tmp_path / "away.safetensors").rename(tmp_path / "whole" / "model.safetensors")
        (tmp_path / "whole" / "config.json").write_text((dense / "config.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        model.save_pretrained(dense, max_shard_size="2MB")
        assert len(list(dense.glob("*.safetensors"))) >= shards
    weights = sum(p.stat().st_size for p in dense.glob("*.safetensors"))
    told = tiny.cli("upcycle", "them/dense", tmp_path / "moe", "--granularity", 2, "--plan", "--json", env=env)
    assert told.returncode == 0, told.stderr
    local = tiny.cli("upcycle", dense, tmp_path / "moe", "--granularity", 2, "--plan", "--json")
    remote_plan, local_plan = json.loads(told.stdout), json.loads(local.stdout)
    for key in ("parameters", "num_bytes", "num_shards", "recipe", "flops_per_token", "target"):
        assert remote_plan[key] == local_plan[key]
    # The client asks for the first 100 kB of each file, in which the headers lie.
    read = sum(size for name, size in handler.sent.items() if name.endswith(".safetensors"))
    assert 0 < read <= 100_001 * len(list(dense.glob("*.safetensors")))
    assert read < weights / 4
    assert not (tmp_path / "moe").exists()


def test_a_hub_model_without_safetensors_or_that_is_not_there(
    hub: tuple[type[Hub], dict[str, str]], tmp_path: Path
) -> None:
    _, env = hub
    dense = tiny.save_llama(tmp_path / "hub")
    (dense / "model.safetensors").rename(dense / "pytorch_model.bin")
    told = tiny.cli("upcycle", "them/dense", tmp_path / "moe", "--plan", env=env)
    assert told.returncode == 1
    assert "holds no safetensors on the hub" in told.stderr
    told = tiny.cli("upcycle", "them/other", tmp_path / "moe", "--plan", env=env)
    assert told.returncode == 1
    assert "the hub did not give it" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
