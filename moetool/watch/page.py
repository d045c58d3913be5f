"""The page: one file with its data, its program and the plotting library; it loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetool import __version__
from moetool.outside import finite, safe_json
from moetool.watch.run import WatchedRun

SCHEMA_VERSION = 1
_FOLDER = Path(__file__).parent / "templates"
_PARTS = {
    "uplot_css": "uplot/uPlot.min.css",
    "style": "style.css",
    "uplot": "uplot/uPlot.iife.min.js",
    "elements": "elements.js",
    "figure": "figure.js",
    "phases": "phases.js",
    "charts": "charts.js",
    "heat": "heat.js",
    "routers": "routers.js",
    "page": "page.js",
}


def collect(
    runs: Sequence[WatchedRun], scores: Sequence[dict[str, Any]] = (), problems: Sequence[str] = ()
) -> dict[str, Any]:
    """The document of some runs: what `moetool watch --json` prints (described in docs/watch.md).

    Args:
        runs: read before.
        scores: of their checkpoints, see scores.py.
        problems: what could not be read, besides what the runs tell themselves.
    """
    documents = [run.document(len(runs)) for run in runs]
    return {
        "schema_version": SCHEMA_VERSION,
        "moetool": __version__,
        "made": round(time.time(), 3),
        "problems": [f"{one['name']}: {one['problem']}" for one in documents if one["problem"]] + list(problems),
        "runs": documents,
        "scores": list(scores),
    }


def render(document: dict[str, Any], every: int = 0, version: int = 0) -> str:
    """The page of a document.

    Args:
        document: see `collect`.
        every: milliseconds between requests for newer numbers; 0: it stays as it is.
        version: of the document, see server.py.
    """
    parts = {name: (_FOLDER / file).read_text(encoding="utf-8") for name, file in _PARTS.items()}
    scripts = [_hash(parts[name]) for name, file in _PARTS.items() if file.endswith(".js")]
    connect = "'self'" if every else "'none'"
    parts["policy"] = (
        f"default-src 'none'; script-src {' '.join(scripts)}; style-src 'unsafe-inline'; img-src data: blob:;"
        f" connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts["data"] = document_json(document, every, version)
    template = (_FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], template)


def document_json(document: dict[str, Any], every: int, version: int) -> str:
    """The document as the page reads it; sums of absurd rows may be infinite, which JSON does not know."""
    document = document | {"every": every, "version": version}
    try:
        return safe_json(document)
    except ValueError:
        return safe_json(finite(document))


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
