"""Every command in README.md and docs/ runs, or stands below with the reason why it cannot here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "cli.md")]

NOT_RUN = {
    "make quickstart": "tests/integration/test_quickstart.py (slow)",
    "make test": "this is it",
    "moetool quickstart": "tests/integration/test_quickstart.py (slow)",
    "torchrun --nproc_per_node 8": "needs eight GPUs",
    "ACCELERATE_USE_CPU=true torchrun": "tests/integration/test_train_cpt.py (slow) runs it",
    "accelerate launch": "needs GPUs and a network",
    "moetool tokenize 'hf:": "needs a network",
    "--tasks arc_easy": "needs a network; tests/integration/test_eval.py runs local tasks",
}


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's bash blocks, comments and continued lines taken care of."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and texts that the pages speak of, small."""
    root = tmp_path_factory.mktemp("docs")
    (root / "data" / "src").mkdir(parents=True)
    (root / "data" / "books").mkdir()
    for seed, name in enumerate(("llama", "llama-code", "llama-prose")):
        tiny.save_llama(root / "models" / name, seed)
    for name in ("code", "prose"):
        tiny.save_jsonl(root / "data" / f"{name}.jsonl", repeat=60)
    (root / "data" / "src" / "a.py").write_text("def add(a, b):\n    return a + b\n" * 40)
    (root / "data" / "books" / "b.txt").write_text("A router sends each token to a few experts. " * 40)
    (root / "data" / "notes.txt").write_text("One note.\n\nAnother note.\n")
    (root / "data" / "counts.json").write_text(json.dumps({"code": {"0": [5, 3, 1, 1], "1": [4, 2, 2, 2]}}))
    return root


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_of_a_page_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # What earlier pages have made.
    needed = {
        "models/moe": ("upcycle", "models/llama", "models/moe"),
        "runs/code": (
            *(
                "cpt",
                "models/moe",
                "runs/code",
                "--train",
                "code=data/code.jsonl",
                "--replay",
                "prose=data/prose.jsonl",
            ),
            *("--max-tokens", "100k"),
        ),
    }
    text = " ".join(commands(page))
    for made, arguments in needed.items():
        if made in text and not Path(made).exists() and f"{' '.join(arguments[:3])} " not in text + " ":
            assert tiny.in_process(*arguments)[0] == 0
    for command in commands(page):
        if any(part in command for part in NOT_RUN):
            continue
        words = shlex.split(command, comments=True)
        assert words[0] == "moetool", f"{page.name}: not run and not in NOT_RUN: {command}"
        expanded = [str(p) for w in words[1:] for p in (sorted(Path().glob(w)) if "step-*" in w else [w])]
        code, _, err = tiny.in_process(*expanded)
        assert code == 0 or (code == 3 and "--fail-if" in command), f"{page.name}: {command}\n{err}"


def test_every_reason_is_still_needed() -> None:
    every = [command for page in PAGES for command in commands(page)]
    for part in NOT_RUN:
        assert part == "moetool quickstart" or any(part in command for command in every), part


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
