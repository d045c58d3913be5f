"""What takes seconds to import is imported by the command that needs it, and by no other."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from moetool.cli import COMMANDS

# Each command in turn, in one process: what one has imported, those after it may have as well.
CODE = """
import sys
from pathlib import Path
from moetool.cli import run

llama, folder, text = sys.argv[1:]
moe, tokens, training = f"{folder}/moe", f"{folder}/tokens", f"{folder}/run"
small = ["--seq-len", "16", "--global-batch-size", "1", "--max-steps", "1", "--val-fraction", "0"]
evaluation = {"lm_eval", "datasets", "pandas", "pyarrow", "sklearn", "sacrebleu", "nltk"}
plain = evaluation | {"matplotlib", "jinja2"}
models = plain | {"transformers", "tokenizers", "accelerate", "scipy"}
for absent, command in (
    (models | {"torch", "numpy"}, ["inspect", llama]),
    (models, ["upcycle", llama, moe, "--num-experts", "4"]),
    (models, ["verify", moe]),
    (evaluation | {"matplotlib", "accelerate", "scipy"}, ["tokenize", text, "--out", tokens, "--tokenizer", moe]),
    (evaluation | {"matplotlib"}, ["cpt", moe, training, "--train", f"a={tokens}", *small]),
    (evaluation, ["analyze-routing", moe, "--data", f"a={tokens}", "--out", f"{folder}/report"]),
):
    assert run([*command, "--quiet"]) == 0, command
    assert not absent & sys.modules.keys(), (command[0], absent & sys.modules.keys())
assert "matplotlib" in sys.modules
"""
COLLECTED = """
import gc
from moetool.__main__ import main
from moetool.commands.console import Console

make, seen = Console.__init__, []
def noted(*arguments):
    seen.append(gc.isenabled())
    make(*arguments)
    seen.append(gc.isenabled())
    seen.append(gc.get_freeze_count())
Console.__init__ = noted
try:
    main()
except SystemExit as end:
    assert end.code == 0
before, after, imported = seen
assert (before, after) == (False, True)
assert 10_000 < imported < gc.get_freeze_count()
"""
EVALUATION = """
import sys
from moetool.cli import run

moe, text = sys.argv[1:]
assert run(["eval", moe, "--text", f"a={text}", "--limit", "1", "--quiet"]) == 0
assert "lm_eval" in sys.modules
assert "matplotlib" not in sys.modules
"""


def run(code: str, *arguments: object) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def test_each_command_imports_what_it_needs(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A router sends each token to a few experts. " * 20)
    run(CODE, llama, tmp_path, text)


def test_garbage_is_searched_for_once_the_imports_are_done(llama: Path) -> None:
    run(COLLECTED, "inspect", llama)
    for command in COMMANDS.values():  # which turns it on
        assert inspect.getsource(command).count("Console(context, ") == 1


@pytest.mark.slow
def test_eval_draws_only_what_is_written(mixtral: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A router sends each token to a few experts. " * 20)
    run(EVALUATION, mixtral, text)
