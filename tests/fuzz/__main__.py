"""Search for hostile input that breaks a reader, guided by the branches of moetool that inputs reach.

    pip install 'moetool[fuzz]'                            # atheris, which brings libFuzzer
    python -m tests.fuzz --minutes 5 config header         # without names: every kind of input
    python -m tests.fuzz --random 100000 parquet           # variants of sound input alone, no atheris needed

Each kind of input is searched in a process of its own. An input that neither is taken nor refused in one
line is kept in --findings, once for each place in moetool; a crash of a native library ends the search of
its kind. The same seed gives the same inputs on the same machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import mutate

SCRATCH = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
BATCH = 200  # inputs that a child tries of a kind that a native library reads


def main() -> int:
    """Run the searches that were asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each kind, with guidance")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N variants of each kind instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a process of the search
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        if options.one:
            return _search(options, Path(folder))
        if options.random:
            return _vary(options, Path(folder))
        return _search_all(options, Path(folder))


def _models(folder: Path) -> tuple[Path, Path]:
    from transformers.utils import logging

    from tests import tiny

    logging.disable_progress_bar()
    return tiny.save_llama(folder / "llama"), tiny.save_mixtral(folder / "mixtral")


def _targets(folder: Path) -> dict[str, Any]:
    from tests.fuzz.targets import targets

    (folder / "scratch").mkdir()
    return targets(*_models(folder), folder / "scratch")


def _note(findings: Path, name: str, data: bytes, error: BaseException) -> str:
    """Keep an input under the place where it failed; the first of each place stays."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/moetool/" in f.filename]
    place = f"{Path(frames[-1].filename).name}-{frames[-1].lineno}" if frames else "elsewhere"
    findings.mkdir(parents=True, exist_ok=True)
    file = findings / f"{name.replace(' ', '-')}-{type(error).__name__}-{place}"
    if not file.exists():
        file.write_bytes(data)
        print(f"FOUND {file}: {' '.join(str(error).split())[:200]}", flush=True)
    return file.name


def _search_all(options: argparse.Namespace, folder: Path) -> int:
    names = options.targets or list(_targets(folder))
    failed = 0
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--seed", str(options.seed)]
        command += ["--minutes", str(options.minutes), "--findings", str(options.findings)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        text = done.stdout + done.stderr
        coverage = re.findall(r"cov: (\d+)", text)
        inputs = re.findall(r"^#(\d+)", text, re.MULTILINE) or ["0"]
        found = sorted(set(re.findall(r"^FOUND (.*)", text, re.MULTILINE)))
        crash = re.findall(r"(ERROR: libFuzzer.*|==\d+== ERROR.*)", text)
        if done.returncode and not crash:
            crash = [f"exit {done.returncode}: {text[-1000:]}"]
        told = f"branches {coverage[0]} -> {coverage[-1]}" if coverage else f"no search: {text[-500:]}"
        print(f"{name}: {max(map(int, inputs))} inputs, {told}, {len(found) + len(crash)} failures", flush=True)
        for line in found + crash:
            print(f"  {line}")
        failed += bool(found or crash or not coverage)
    return int(failed > 0)


def _search(options: argparse.Namespace, folder: Path) -> int:
    """One kind, in this process: libFuzzer takes it over."""
    import atheris

    from moetool.errors import MoetoolError

    with atheris.instrument_imports(include=["moetool"], exclude=["moetool.errors"]):
        from tests.fuzz.targets import attempt, bounded

        target = _targets(folder)[options.one]
        for seed in target.seeds:  # what is imported in functions is instrumented, too
            attempt(target, seed)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            with bounded(seconds=0):
                attempt(target, data)
        except MoetoolError:
            raise AssertionError("attempt takes these") from None
        except Exception as error:
            _note(options.findings, options.one, data, error)

    def vary(data: bytes, max_size: int, seed: int) -> bytes:
        return mutate.mutate(data, Random(seed), target.as_json)[:max_size]

    arguments = [sys.argv[0], str(corpus), f"-max_total_time={int(options.minutes * 60)}", f"-seed={options.seed}"]
    arguments += [
        "-max_len=200000",
        "-len_control=0",
        "-timeout=20",
        "-rss_limit_mb=4000",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup(arguments, one, custom_mutator=vary)
    atheris.Fuzz()
    return 0


def _vary(options: argparse.Namespace, folder: Path) -> int:
    from tests.fuzz.targets import attempt, bounded
    from tests.hostile import in_child

    every = _targets(folder)
    failed = 0
    for name in options.targets or every:
        target, random = every[name], Random(f"{options.seed} {name}")
        taken, found, tried = 0, set(), 0

        def some(count: int, target: Any = target, random: Random = random, name: str = name) -> tuple[int, set[str]]:
            taken, found = 0, set()
            for _ in range(count):
                data = mutate.mutate(random.choice(target.seeds), random, target.as_json)
                try:
                    with bounded():
                        taken += attempt(target, data)
                except Exception as error:
                    found.add(_note(options.findings, name, data, error))
            return taken, found

        def printed(some: Any = some) -> int:
            taken, found = some(BATCH)
            print("taken", taken, *found, sep="\n")
            return 0

        while tried < options.random:
            if target.child:
                random.seed(f"{options.seed} {name} {tried}")
                outcome = in_child(printed, megabytes=2000, seconds=120)
                lines = outcome.out.splitlines()
                taken += int(lines[lines.index("taken") + 1]) if "taken" in lines else 0
                found |= set(lines[lines.index("taken") + 2 :]) if "taken" in lines else set()
                if outcome.code:
                    found.add(f"{name}: exit {outcome.code} among inputs {tried} to {tried + BATCH}")
                tried += BATCH
            else:
                more, places = some(options.random)
                taken, found, tried = taken + more, found | places, options.random
        print(f"{name}: {tried} inputs, {taken} taken, {tried - taken} refused, {len(found)} failures", flush=True)
        for line in sorted(found):
            print(f"  {line}")
        failed += len(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
