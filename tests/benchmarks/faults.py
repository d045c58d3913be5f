"""How often each fault was tried and what happened: the table of docs/reliability.md.

    python -m tests.benchmarks.faults [--times N] [--only WORD] [--folder DIR] [--seed 0]

Needs root for the disks (small tmpfs mounts); without it those rows are left out. With --folder, tries that were
counted before are kept, so that it can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

from tests.faults.table import FAULTS
from tests.faults.world import Fault, World, can_mount


def main() -> None:
    """Try, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, help="tries of each fault, instead of its own number")
    parser.add_argument("--only", default="", help="faults whose name or place holds this")
    parser.add_argument("--folder", type=Path, help="where models and counts are kept")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        world = World(folder)
        mounts = can_mount(folder)
        for number, fault in enumerate(FAULTS):
            if given.only in f"{fault.name}: {fault.where}" and (mounts or not fault.mounts):
                run(world, fault, given.times or fault.tries, given.seed + 1000 * number)
        print(table(folder))


def run(world: World, fault: Fault, times: int, seed: int) -> None:
    """Try a fault as often as is left, and note each outcome at once."""
    log = world.folder / "outcomes.jsonl"
    done = sum(row["name"] == fault.name and row["where"] == fault.where for row in rows(log))
    for attempt in range(done, times):
        began = time.monotonic()
        try:
            what = fault.once(world, Random(seed + attempt))
        except AssertionError:
            what = f"FAILED: {traceback.format_exc()}"
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": fault.name, "where": fault.where, "what": what}) + "\n")
        print(
            f"{fault.name}: {fault.where}: {attempt + 1}/{times}: {what} ({time.monotonic() - began:.0f} s)", flush=True
        )


def rows(log: Path) -> list[dict[str, str]]:
    """What was noted."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def table(folder: Path) -> str:
    """The counts as Markdown."""
    outcomes: dict[tuple[str, str], Counter[str]] = {(fault.name, fault.where): Counter() for fault in FAULTS}
    for row in rows(folder / "outcomes.jsonl"):
        outcomes.setdefault((row["name"], row["where"]), Counter())[row["what"]] += 1
    lines = ["| fault | where | tried | what happened |", "|---|---|---|---|"]
    for (name, where), counts in outcomes.items():
        told = "; ".join(f"{count}: {what}" for what, count in counts.most_common())
        lines.append(f"| {name} | {where} | {counts.total()} | {' '.join(told.split())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
