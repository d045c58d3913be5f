"""The quickstart as a user runs it: twice, with two seeds, and what it claims."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


@pytest.mark.slow
def test_the_numbers_make_sense_with_two_seeds(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    for seed in (0, 1):
        began = time.perf_counter()
        done = tiny.cli(
            "quickstart", tmp_path / f"q{seed}", "--seed", seed, "--json", timeout=1500, env={"OMP_NUM_THREADS": "2"}
        )
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout) | {"wall": time.perf_counter() - began})
    for run in seen:
        losses = run["losses"]
        # Prose loss falls while the dense model trains, from that of a uniform guess.
        assert abs(losses["random"]["prose"] - run["ln_vocabulary"]) < 0.2
        assert losses["dense"]["prose"] < losses["random"]["prose"] - 2
        # Ratio 0 starts at the dense loss, 0.5 between that and ln(vocabulary).
        for domain in ("prose", "code"):
            assert abs(losses["moe-copy"][domain] - losses["dense"][domain]) < 1e-4
        assert losses["dense"]["prose"] < losses["moe"]["prose"] < run["ln_vocabulary"]
        # Code is learned, with and without replay.
        assert run["adaptation"]["cpt-replay"] < -0.5
        assert run["adaptation"]["cpt-no-replay"] < -0.5
        assert Path(run["report"]).is_file()
        assert Path(run["eval"]).is_file()
    # Replay forgets less than none, by clearly more than the seeds differ.
    gain = [run["forgetting"]["cpt-no-replay"] - run["forgetting"]["cpt-replay"] for run in seen]
    spread = max(abs(seen[0]["forgetting"][name] - seen[1]["forgetting"][name]) for name in seen[0]["forgetting"])
    assert min(gain) > 3 * spread


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code, _, err = tiny.in_process("quickstart", tmp_path)
    assert code == 1
    assert "thesis.tex" in err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
