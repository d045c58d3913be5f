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
# docs/cli.md is generated; docs/recipes.md is run in small by test_docs_recipes.py.
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in ("cli.md", "recipes.md")),
]
RUNNERS = ("moetool", "python", "python3", "torchrun", "accelerate", "pip", "make", "hf", "lm_eval")

# Part of a command -> why it is not run here.
NOT_RUN = {
    "make quickstart": "tests/integration/test_quickstart.py (slow)",
    "make test": "this is it",
    "moetool quickstart": "tests/integration/test_quickstart.py (slow)",
    "torchrun --nproc_per_node 8": "needs eight GPUs",
    "torchrun --nnodes 2": "needs two machines",
    "ACCELERATE_USE_CPU=true torchrun": "tests/integration/test_train_cpt.py (slow) runs it",
    "accelerate launch": "needs GPUs and a network",
    "./scripts/conversion/convert.sh": "of Megatron-Bridge; the page says that it was not run",
    "scripts/training/run_recipe.py": "of Megatron-Bridge; the page says that it was not run",
    "automodel examples/": "of NeMo Automodel; the page says that it was not run",
    "./run_train.sh": "of torchtitan; the page says that it was not run",
    "moetool watch runs/code --open": "serves until it is interrupted; tests/integration/test_watch.py",
    "moetool tokenize 'hf:": "needs a network",
    "python -m tests.benchmarks.faults": "takes an hour, needs root; tests/integration/test_faults.py",
    "pip install '.[fuzz]'": "needs a network",
    "python -m tests.fuzz": "takes minutes, needs atheris; tests/integration/test_hostile_input.py",
    "python -m pytest": "tests themselves, which run with these",
    "--probe": "trains for a minute; tests/integration/test_plan_probe.py (slow)",
    "python docs/studies/": "takes hours; tests/unit/test_studies.py parses each command",
    " s0/": "of the studies; tests/unit/test_studies.py compares them with what the scripts run",
    "--tasks arc_easy": "needs a network; tests/integration/test_eval.py runs local tasks",
}

# Commands named in a sentence or a table that are not moetool's: part of one -> why it is not run here.
NAMED = {
    "make test": "this is it",
    "pip install": "needs a network; tests/integration/test_wheel.py (slow) installs the wheel",
    "lm_eval run": "tests/integration/test_eval_against_lm_eval.py runs it",
    "python -m tests.benchmarks.": "takes minutes and measures; that its options exist is tested here",
    "python -m tests.clients": "takes an hour and measures; tests/unit/test_clients_table.py holds its results",
    "accelerate launch --cpu": "starts one process, as the page says",
    "torchrun --nproc_per_node 2 -m moetool eval": "tests/integration/test_eval_processes.py runs it",
    "torchrun --nnodes 2": "tests/integration/test_two_machines.py (slow) runs it",
    "hf download": "needs a network",
    "hf auth login": "needs an account",
}
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[str]:
    """The lines of a page's bash blocks, comments and continued lines taken care of."""
    for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield line.strip()


def named(page: Path) -> Iterator[str]:
    """The commands with arguments that a page names outside of blocks."""
    for code in re.findall(r"`([^`]+)`", _BLOCK.sub("", page.read_text(encoding="utf-8"))):
        words = [word for word in code.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        if len(words) > 1 and words[0] in RUNNERS and words != ["accelerate", "launch"]:
            yield " ".join(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and texts that the pages speak of, small."""
    root = tmp_path_factory.mktemp("docs")
    (root / "data" / "src").mkdir(parents=True)
    (root / "data" / "books").mkdir()
    for seed, name in enumerate(("llama", "llama-code", "llama-prose")):
        tiny.save_llama(root / "models" / name, seed)
    tiny.save_adapter(root / "models" / "lora")
    tiny.save_pickled(root / "models" / "llama", root / "models" / "pickled")
    for repeat, name in enumerate(("code", "prose"), 15):
        tiny.save_jsonl(root / "data" / f"{name}.jsonl", repeat=repeat)
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
    text += " models/moe" if "runs/code" in text else ""  # which it is made of
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
        assert any(part in command for command in every), part
    outside = [command for page in [*PAGES, ROOT / "docs" / "recipes.md"] for command in named(page)]
    for part in NAMED:
        assert any(part in command for command in outside), part


def test_commands_stand_in_blocks_that_are_run() -> None:
    for page in [*PAGES, ROOT / "docs" / "recipes.md"]:
        for language, block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines() if language != "bash" else ():
                first = line.lstrip("$ ").partition(" ")[0]
                assert first not in RUNNERS, f"{page.name}: give the block of this line ```bash: {line}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "recipes.md"], ids=lambda p: p.name)
def test_commands_in_sentences_and_tables_exist(page: Path) -> None:
    from typer.main import get_command

    from moetool.cli import app

    known = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    for command in named(page):
        words = shlex.split(command)
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if words[0] == "moetool" and words[1].startswith("-"):
            assert words[1:] in (["--help"], ["--version"], ["--install-completion"], ["--show-completion"]), command
        elif words[0] == "moetool":
            assert words[1] in known, f"{page.name}: {command}"
            assert options <= known[words[1]] | {"--help"}, f"{page.name}: {command}"
        else:
            assert any(part in command for part in NAMED), f"{page.name}: not run and not in NAMED: {command}"
        if words[:2] == ["python", "-m"]:
            source = ROOT / (words[2].replace(".", "/") + ".py")
            assert all(option in source.read_text(encoding="utf-8") for option in options), command


def test_the_launches_that_configurations_show_are_those_of_the_page() -> None:
    shown = (ROOT / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
    for file in sorted((ROOT / "docs" / "accelerate").glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(f"# accelerate launch --config_file docs/accelerate/{file.name} --num_processes ")
        assert f"](accelerate/{file.name})" in shown


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
