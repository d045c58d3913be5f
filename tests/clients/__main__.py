"""`python -m tests.clients`: measure what engines do with our checkpoints, and write docs/clients.md.

With no option it goes on where it was stopped: a row is run again when the checkpoint, or the
engine's version, is another than what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.clients import page
from tests.clients.cases import Case, cases
from tests.clients.environments import CACHE, VERSIONS
from tests.clients.models import make
from tests.clients.run import WORKERS, run


def main() -> None:
    """Parse, make the models, run the engines two at a time, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--client", choices=WORKERS, action="append", help="this engine; repeats")
    parser.add_argument("--anew", action="store_true", help="run rows again that have a verdict")
    parser.add_argument("--minutes", type=float, default=120, help="begin no row after this")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    parser.add_argument("--page", action="store_true", help="write the page from what was measured, and stop")
    asked = parser.parse_args()
    chosen = [case for case in cases() if asked.only in case.name]
    if asked.list:
        print(*(case.name for case in chosen), sep="\n")
        return
    if not asked.page:
        _measure(chosen, asked.client or list(WORKERS), asked.anew, time.monotonic() + asked.minutes * 60)
    page.write(page.load())


def _measure(chosen: list[Case], clients: list[str], anew: bool, until: float) -> None:
    old, folders = page.load(), {}
    rows = {case.name: old[case.name] for case in cases() if case.name in old}  # in order; without what is no case now
    for case in chosen:
        folders[case.name] = CACHE / "rows" / case.name
        rows[case.name] = _row(case, folders[case.name], {} if anew else old.get(case.name, {}))
        print(f"\r{len(folders)} of {len(chosen)} models", end="", file=sys.stderr)
    rows = {case.name: rows[case.name] for case in cases() if case.name in rows}
    page.store(rows)
    lock = threading.Lock()

    def say(client: str, name: str, verdict: dict[str, Any]) -> None:
        with lock:
            row = rows[name]
            row["clients"][client] = verdict | {"version": VERSIONS[client]}
            row["measured"] = datetime.date.today().isoformat()
            page.store(rows)
            print(f"{name} {client} {verdict}", flush=True)

    def run_all(some: list[str]) -> None:
        for client in some:
            left = [
                folders[name]
                for name in folders
                if "refused" not in rows[name]
                and (client != "mergekit" or rows[name]["trait"] == "plain")  # it reads weights and nothing else
                and rows[name]["clients"].get(client, {}).get("version") != VERSIONS[client]
            ]
            run(client, left, lambda name, verdict, client=client: say(client, name, verdict), until)  # type: ignore[misc]

    # vLLM takes as long as the others together.
    threads = [
        threading.Thread(target=run_all, args=(some,))
        for some in ([c for c in clients if c == "vllm"], [c for c in clients if c != "vllm"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _row(case: Case, folder: Path, old: dict[str, Any]) -> dict[str, Any]:
    """A row with the verdicts that still hold."""
    today = datetime.date.today().isoformat()
    made = make(case, folder)
    same = made.get("digest") is not None and made["digest"] == old.get("digest")
    return {
        "dense": case.dense,
        "target": case.target,
        "trait": case.trait,
        "measured": old.get("measured", today) if same else today,
        **made,
        "clients": old["clients"] if same else {},
    }


main()
