"""Time and memory of `moetool average`, `grow`, `densify` and `prune` at three sizes of one model.

    python -m tests.benchmarks.surgery [--folder DIR] [--only WORD]

Random Mixtrals (8 experts, top-2, bf16) of about 0.1, 0.4 and 1 B parameters. `average` has three copies of one;
`grow` makes 16 experts of 8; `densify` keeps 2 and `prune` 6, after a pass over 512 tokens in fp32. The largest size
needs 16 GB of disk. The memory is the peak of the process and its workers, pages that they share counted once; the
sources are warm in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.surgery_folders import SIZES
from tests.benchmarks.upcycle_speed import IMPORTS, machine, measure, settle, size_of

PASS = ["--seq-len", "128", "--max-tokens", "512", "--dtype", "float32"]


def commands(folder: Path) -> dict[str, list[str]]:
    """The command lines, without OUT, which `average` has first and the others second."""
    moe, data = str(folder / "moe"), ["--data", f"text={folder / 'text.jsonl'}", *PASS]
    return {
        "average": ["average", *(str(folder / name) for name in ("moe", "moe-2", "moe-3"))],
        "grow --start twins": ["grow", moe, "--num-experts", "16", "--start", "twins"],
        "densify": ["densify", moe, "--keep-experts", "2", *data],
        "prune --score weighted-ean": ["prune", moe, "--keep-experts", "6", *data, "--score", "weighted-ean"],
        "prune --score auto": ["prune", moe, "--keep-experts", "6", *data],
    }


def with_out(words: list[str], out: Path) -> list[str]:
    """A command line with OUT in its place, as a process."""
    place = 1 if words[0] == "average" else 2
    return [sys.executable, "-m", "moetool", *words[:place], str(out), *words[place:], "--verify", "none", "--quiet"]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--only", default="", help="commands that begin with this")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        top = Path(name)
        print(machine(top), flush=True)
        start = measure(IMPORTS)
        print("\n| parameters | command | read GB | written GB | seconds | processor s | peak MB | of it anonymous |")
        print("|---|---|---|---|---|---|---|---|")
        cells = [f"{start.seconds:.1f}", f"{start.cpu:.1f}", f"{start.peak:.0f}", f"{start.anonymous:.0f}"]
        print(f"| | imports only | | | {' | '.join(cells)} |")
        for size in SIZES:
            folder, out = top / size, top / "out"
            # In a process of its own: a child's peak memory counts what it had of its parent's.
            subprocess.run([sys.executable, "-m", "tests.benchmarks.surgery_folders", folder, size], check=True)
            for command, words in commands(folder).items():
                if not command.startswith(given.only):
                    continue
                os.environ["MOETOOL_CACHE"] = str(top / "cache")  # emptied, so that each command makes its own pass
                sources = [Path(word) for word in words if Path(word).is_dir()]
                for source in sources:
                    settle(source)
                ran = measure(with_out(words, out))
                read = sum(map(size_of, sources))
                cells = [size, f"`{command}`", f"{read:.2f}", f"{size_of(out):.2f}", f"{ran.seconds:.1f}"]
                cells += [f"{ran.cpu:.1f}", f"{ran.peak:.0f}", f"{ran.anonymous:.0f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
                shutil.rmtree(out)
                shutil.rmtree(top / "cache", ignore_errors=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
