"""The wheel, installed alone in a clean environment, runs the quickstart."""

from __future__ import annotations

import json
import os
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_alone_runs_the_quickstart(tmp_path: Path) -> None:
    tools, clean, alone = tmp_path / "tools", tmp_path / "clean", tmp_path / "alone"
    alone.mkdir()
    for place in (tools, clean):
        venv.create(place, with_pip=True)
    if run(tools / "bin" / "python", "-m", "pip", "install", "--quiet", "build", cwd=alone).returncode:
        pytest.skip("no package index: `build` cannot be installed")
    built = run(tools / "bin" / "python", "-m", "build", "--outdir", tmp_path / "dist", ROOT, cwd=alone)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("moetool/")}
    tracked = run("git", "-C", ROOT, "ls-files", "moetool", cwd=ROOT).stdout.split()
    assert packed == set(tracked)
    install = ("-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    pip = run(clean / "bin" / "python", *install, cwd=alone)
    assert pip.returncode == 0, pip.stderr
    done = run(clean / "bin" / "moetool", "quickstart", "demo", "--json", cwd=alone)
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)["losses"]
    assert losses["cpt-replay"]["code"] < losses["moe"]["code"]
