"""What a newcomer runs into in the first hour: mistakes, small machines, plain terminals, pipes, shells."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetool.cost import devices, memory
from tests import forked, tiny


def fails(*arguments: object, code: int = 1) -> str:
    """The one line that a command ends with."""
    ended, _, err = tiny.in_process(*arguments)
    assert ended == code, err
    last: str = err.strip().splitlines()[-1]
    assert last.startswith("moetool: ")
    assert "Traceback" not in err
    return last


# --- paths and names


def test_a_folder_that_is_spelled_almost_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_llama(tmp_path / "models" / "llama")
    for path in ("models/lama", "./models/lama", tmp_path / "models" / "lama"):
        assert "did you mean" in fails("inspect", path)
        assert "models/llama?" in fails("inspect", path)
    assert "did you mean" not in fails("inspect", "someone/else")


def test_the_hub_without_a_network_says_how_to_bring_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = fails("upcycle", "owner/model@v1", "moe", "--plan")
    assert "`hf download owner/model --revision v1`" in told
    assert not (tmp_path / "moe").exists()


def test_a_single_text_file_is_enough(llama: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("The load of each expert should be balanced. " * 60)
    tokens = tmp_path / "tokens"
    assert tiny.in_process("tokenize", book, "--out", tokens, "--tokenizer", llama)[0] == 0
    size = ("--seq-len", 16, "--global-batch-size", 2, "--max-steps", 2)
    losses = []
    for source in (book, tokens):
        run = tmp_path / f"run-{source.name}"
        code, out, err = tiny.in_process("cpt", llama, run, "--train", f"book={source}", *size)
        assert code == 0, err
        assert re.search(r"val +book: \d+ tokens, the last part of its only document\n", out)
        losses.append(json.loads((run / "summary.json").read_text())["val"]["book"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("--train", "data/code.jsonl"), "such as --train code=data/code.jsonl"),
        (("--train", "=data/code.jsonl"), "such as --train code=data/code.jsonl"),
        (("--train", "web="), "such as --train web=src.jsonl"),
        (("--train", "a=x", "b=y"), "(b=y); repeat the option for each value: --train a=A --train b=B"),
    ],
)
def test_text_without_its_name(typed: tuple[str, ...], told: str) -> None:
    assert told in fails("cpt", "model", "out", *typed, "--max-steps", 1, code=2)


# --- recipes


def test_the_same_ratio_in_other_digits_is_the_same_recipe(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out, "--drop-ratio", "0.5", "--router-std", "0.020")[0] == 0
    code, text, err = tiny.in_process("upcycle", llama, out, "--drop-ratio", "0.50", "--json")
    assert code == 0, err
    assert json.loads(text)["already_finished"] is True


def test_a_finished_folder_of_another_recipe_tells_what_differs(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out)[0] == 0
    assert "(drop_ratio 0.5 -> 0.25, seed 0 -> 3)" in fails("upcycle", llama, out, "--drop-ratio", "0.25", "--seed", 3)
    other = tiny.save_llama(tmp_path / "other", seed=1)
    assert "(same recipe, but another or changed source" in fails("upcycle", other, out)


def test_one_positional_beside_a_file_goes_to_the_place_that_is_open(llama: Path, tmp_path: Path) -> None:
    both = f"dense: {llama}\nout: {tmp_path / 'first'}\n"
    (tmp_path / "both.yaml").write_text(both)
    told = fails("upcycle", "--config", tmp_path / "both.yaml", tmp_path / "second", "--plan", code=2)
    assert "could be DENSE or OUT" in told
    (tmp_path / "dense.yaml").write_text(f"dense: {llama}\n")
    code, text, err = tiny.in_process(
        "upcycle", f"--config={tmp_path / 'dense.yaml'}", tmp_path / "second", "--plan", "--json"
    )
    assert code == 0, err
    assert json.loads(text)["out"] == str(tmp_path / "second")
    (tmp_path / "out.yaml").write_text(f"out: {tmp_path / 'third'}\n")
    code, text, err = tiny.in_process("upcycle", llama, "--config", tmp_path / "out.yaml", "--plan", "--json")
    assert code == 0, err
    assert json.loads(text)["out"] == str(tmp_path / "third")


# --- memory


def gpu_is_full(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


@pytest.mark.parametrize("where", ["load", "run"])
def test_a_gpu_that_is_too_small(
    where: str, mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "load":
        from transformers import AutoModelForCausalLM

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", gpu_is_full)
    else:
        from transformers import MixtralModel

        monkeypatch.setattr(MixtralModel, "forward", gpu_is_full)
    text = f"code={jsonl}"
    told = fails("cpt", mixtral, tmp_path / "run", "--train", text, "--max-steps", 1, "--seq-len", 8)
    assert "out of memory" in told
    assert "the estimate was: memory about" in told
    assert "--micro-batch-size" in told
    told = fails("analyze-routing", mixtral, "--data", text, "--out", tmp_path / "report", "--max-tokens", 100)
    assert "the estimate was: memory about" in told
    assert "--batch-size" in told
    told = fails("eval", mixtral, "--text", text, "--limit", 2)
    assert "out of memory" in told
    assert "--batch-size" in told
    assert where == "run" or "the estimate was: memory about" in told


def test_what_is_needed_is_told_before_weights_are_read(
    mixtral: Path, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fixture's parameters: embeddings and head, then of each layer attention, norms, router and experts.
    layer = 32 * (32 + 16 + 16 + 32) + 2 * 32 + 4 * 32 + 4 * 3 * 32 * 64
    assert memory.weight_bytes(mixtral) == 4 * (2 * 300 * 32 + 2 * layer + 32)
    assert memory.weight_bytes(mixtral, "bfloat16") == memory.weight_bytes(mixtral) // 2
    monkeypatch.setattr(devices, "free_memory", lambda device: 1000)
    for arguments in (
        ("eval", mixtral, "--text", f"code={jsonl}", "--limit", 2),
        ("analyze-routing", mixtral, "--data", f"code={jsonl}", "--out", tmp_path / "report"),
        ("cpt", mixtral, tmp_path / "run", "--train", f"code={jsonl}", "--max-steps", 1, "--seq-len", 8),
    ):
        code, out, err = tiny.in_process(*arguments)
        assert code == 0, err
        assert "memory about" in out
        assert re.search(r"warning: .* needs? about .*cpu has", err), err


def test_memory_that_is_free_is_the_least_of_what_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = devices.free_memory("cpu")
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("6000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 5000\n")
    assert devices._container(tmp_path) == 7000
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._container(tmp_path) is None
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**15, 10**15))
    assert 10**14 < (devices._limit() or 0) < 10**15
    assert devices.free_memory("mps") is None


# --- terminals and pipes


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model about which transformers has much to say: of its rotary scaling, its generation, its tokenizer."""
    folder = tiny.save_mixtral(tmp_path_factory.mktemp("talkative") / "moe")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
        "original_max_position_embeddings": 128, "unknown": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": 4}))
    return folder


ONE_AFTER_THE_OTHER = """
import json, sys
from moetool.__main__ import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, words
"""


def test_quiet_means_errors_only(talkative: Path, jsonl: Path, tmp_path: Path) -> None:
    commands = (
        ("cpt", talkative, tmp_path / "run", "--train", f"a={jsonl}", "--max-steps", 1, "--seq-len", 8),
        ("analyze-routing", talkative, "--data", f"a={jsonl}", "--out", tmp_path / "report", "--max-tokens", 100),
        ("eval", talkative, "--text", f"a={jsonl}", "--limit", 2),
        ("tokenize", jsonl, "--out", tmp_path / "tokens", "--tokenizer", talkative),
    )
    # In a new process, because imports speak, too; in one, because they take seconds.
    words = json.dumps([[*map(str, command), "--quiet"] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert all((tmp_path / made).exists() for made in ("run/summary.json", "report/report.html", "tokens"))


def test_a_locale_without_unicode(mixtral: Path, jsonl: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = tiny.cli("eval", mixtral, "--text", f"a={jsonl}", "--limit", 2, env=plain)
    assert done.returncode == 0
    assert "\\" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "|" in line]
    assert "bits_per_byte v" in done.stdout
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1  # columns stay


def on_a_terminal(*arguments: object, columns: int, env: dict[str, str] | None = None) -> str:
    """What a command writes to a terminal so wide."""
    main, side = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "HF_HUB_OFFLINE": "1"} | (env or {})
    command = [sys.executable, "-m", "moetool", *map(str, arguments)]
    with subprocess.Popen(command, stdout=side, stderr=side, stdin=side, env=environment, close_fds=True):
        os.close(side)
        read = b""
        while True:
            try:
                part = os.read(main, 4096)
            except OSError:  # the other end has gone
                break
            if not part:
                break
            read += part
    os.close(main)
    return read.decode()


def test_sentences_break_between_words_in_a_narrow_terminal_and_stay_whole_in_a_pipe(
    llama: Path, jsonl: Path, tmp_path: Path
) -> None:
    arguments = ("cpt", llama, tmp_path / "run", "--train", f"a={jsonl}", "--max-steps", 1, "--seq-len", 8)
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", on_a_terminal(*arguments, columns=50)).replace("\r\n", "\n")
    assert "parameters on cpu in fp32;" in " ".join(seen.split())
    sentences = [line for line in seen.splitlines() if "━" not in line]
    assert max(map(len, sentences)) <= 50
    assert not re.search(r"paramet\n|token\n|weigh\n", "\n".join(sentences))
    done = forked.start(tmp_path / "streams", *arguments[:2], tmp_path / "again", *arguments[3:]).wait()
    assert done.code == 0
    assert "\x1b" not in done.out + done.err
    assert "━━━" not in done.err  # no bars
    assert re.search(r"memory about .*: weights .*, gradients .*, optimizer .*, activations .*", done.out)


def test_no_color(llama: Path) -> None:
    assert "\x1b[3" not in on_a_terminal("inspect", llama, columns=80, env={"NO_COLOR": "1"})


# --- shells

OFFERED = {
    "upcycle --method ": ["drop", "copy", "noise", "scratch"],
    "upcycle --target qw": ["qwen2_moe", "qwen3_moe", "qwen3_5_moe_text"],
    "upcycle --router ": ["normal", "uniform", "zeros", "orthogonal", "balanced", "ridge"],
    "cpt --schedule c": ["cosine", "constant"],
    "cpt --balance ": [
        "aux",
        "global-aux",
        "pooled-aux",
        "seq-aux",
        "adaptive-aux",
        "z-loss",
        "sinkhorn",
        "loss-free",
        "erc",
        "none",
    ],
    "eval --suite cpt-c": ["cpt-code"],
    "analyze-routing --fail-if satur": ["saturation"],
    "analyze-": ["analyze-routing"],
    "upcycle --drop-i": ["--drop-index"],
    "upcycle --drop-index ": ["shared", "per-matrix"],
}


@pytest.mark.parametrize("line", OFFERED)
def test_a_shell_is_offered_names(line: str) -> None:
    words = line.split(" ")
    environment = os.environ | {
        "_MOETOOL_COMPLETE": "complete_bash", "COMP_WORDS": f"moetool {line}", "COMP_CWORD": str(len(words)),
    }  # fmt: skip
    code = "import sys\nfrom moetool.cli import app\n"
    code += "try: app(prog_name='moetool')\nfinally: assert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == OFFERED[line], done.stderr


@pytest.fixture
def on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `moetool`, as a shell calls it."""
    script = tmp_path / "bin" / "moetool"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m moetool "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))


SHELLS = {
    "bash": 'COMP_WORDS=(moetool upcycle --method c) COMP_CWORD=3; _moetool_completion moetool; echo "${COMPREPLY[@]}"',
    "zsh": '_TYPER_COMPLETE_ARGS="moetool upcycle --method c" _MOETOOL_COMPLETE=complete_zsh moetool',
    "fish": 'complete -C "moetool upcycle --method c"',
}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_in_a_shell(shell: str, on_the_path: None, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    source = {
        "bash": 'eval "$(moetool --show-completion)"',
        "zsh": 'autoload -U compinit; compinit -u; eval "$(moetool --show-completion)"',
        "fish": "moetool --show-completion | source",
    }[shell]
    done = subprocess.run(
        [shell, *(["-f"] if shell == "zsh" else []), "-c", f"{source}\n{SHELLS[shell]}"],
        env=os.environ | {"SHELL": f"/bin/{shell}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "copy" in done.stdout, done.stderr
    assert "drop" not in done.stdout
