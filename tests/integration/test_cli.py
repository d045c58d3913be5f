"""The contract of the command line: help without torch, --json, --quiet, --config, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moetool import registry
from moetool.cli import app
from tests import tiny

COMMANDS = [str(command.name) for command in app.registered_commands]
HEAVY = ("torch", "transformers", "accelerate", "datasets", "lm_eval", "matplotlib", "pandas", "pyarrow", "numpy")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=lambda a: a[0] if a else "moetool")
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from moetool.cli import run; code = run(sys.argv[1:]);"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]; sys.exit(code or len(heavy) and str(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: moetool" in done.stdout


def test_every_command_has_json_quiet_and_config() -> None:
    for name in COMMANDS:
        code, out, _ = tiny.in_process(name, "--help")
        assert code == 0
        assert all(flag in out for flag in ("--json", "--quiet", "--config"))


def test_docs_cli_md_is_what_help_prints() -> None:
    script = Path(__file__).parents[2] / "docs" / "generate_cli.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_registered_name_leads_somewhere() -> None:
    for kind, entries in registry.REGISTRY.items():
        for name, place in entries.items():
            module, _, attribute = place.partition(":")
            assert hasattr(importlib.import_module(module), attribute), f"{kind} {name}"


def test_usage_errors_exit_2_in_one_line() -> None:
    for arguments, expected in [
        (["upcycl"], "Did you mean 'upcycle'"),
        (["upcycle"], "DENSE"),
        (["upcycle", "a", "b", "--top-k", "none"], "--top-k"),
        (["cpt", "a", "b", "--train", "text"], "NAME=PATH"),
        (["inspect", "a", "--tensor"], "--tensors"),
    ]:
        code, out, err = tiny.in_process(*arguments)
        assert (code, out) == (2, "")
        assert expected in err
        assert len(err.splitlines()) == 1, err


def test_json_is_one_document_and_quiet_is_silent(llama: Path, tmp_path: Path) -> None:
    done = tiny.cli("upcycle", llama, tmp_path / "moe", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == "mixtral"
    done = tiny.cli("inspect", tmp_path / "moe", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_output_that_is_piped_has_no_bars_and_no_colours(llama: Path, tmp_path: Path) -> None:
    done = tiny.cli("upcycle", llama, tmp_path / "moe")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "━" not in done.stderr


def test_a_written_moetool_yaml_is_a_valid_config(llama: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert tiny.in_process("upcycle", llama, first, "--drop-ratio", "0.10", "--seed", "5", "--quiet")[0] == 0
    recorded = yaml.safe_load((first / "moetool.yaml").read_text())
    assert recorded["drop-ratio"] == "0.1"  # the decimal, not the nearest binary fraction
    assert "overwrite" not in recorded
    # A flag wins over the file.
    code, out, err = tiny.in_process(
        "upcycle", "--config", first / "moetool.yaml", llama, tmp_path / "second", "--seed", "6", "--json"
    )
    assert code == 0, err
    recipe = json.loads(out)["recipe"]
    assert (recipe["drop_ratio"], recipe["seed"]) == ("0.1", 6)


def test_config_takes_underscores_positionals_and_plain_yaml(llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"dense: {llama}\nout: {tmp_path / 'moe'}\nnum_experts: 4\nplan: true\ndtype: ~\n")
    code, out, err = tiny.in_process("upcycle", "--config", config, "--json")
    assert code == 0, err
    assert json.loads(out)["recipe"]["num_experts"] == 4


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "granitemoe", "granitemoehybrid", "glm4_moe"])
def test_inspect_counts_experts_that_lie_in_one_tensor(llama: Path, tmp_path: Path, target: str) -> None:
    """As transformers 5 holds them in memory, and as mergekit writes them."""
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--target", target, "--num-experts", 4)[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    fused = tmp_path / "fused"
    model.config.save_pretrained(fused)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, fused / "model.safetensors")
    told = [tiny.in_process("inspect", folder, "--json")[1] for folder in (tmp_path / "moe", fused)]
    ours, theirs = (json.loads(text)["parameters"] for text in told)
    shared = json.loads(told[0]).get("shared_intermediate_size")
    assert shared == {"qwen2_moe": 64, "granitemoehybrid": 64, "glm4_moe": 64}.get(target)
    assert theirs["active"] == ours["active"] < ours["total"] == theirs["total"]


def test_inspect_does_not_count_what_it_does_not_know(mixtral: Path, tmp_path: Path) -> None:
    shutil.copytree(mixtral, tmp_path / "unknown")
    config = tmp_path / "unknown" / "config.json"
    config.write_text(config.read_text().replace('"mixtral"', '"unheard_of"'))
    code, out, _ = tiny.in_process("inspect", tmp_path / "unknown")
    assert code == 0
    assert "total, active unknown" in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num-expert: 4", "did you mean 'num-experts'"),
        ("- a", "expected 'flag: value' lines"),
        ("a: [", "not valid YAML"),
        ("num-experts: {a: 1}", "needs a value"),
        ("num-experts: [1, 2]", "takes one value"),
        ("num-experts: 4\nnum_experts: 4", "given twice"),
        ("drop-ratio: 2", "between 0 and 1"),
        ("num-experts: many", "integer"),
        ("num-experts:", "needs a value"),
        ("calibrate: {a: 1, b}", "'calibrate' has no value for 'b'; in braces, quote values that hold a comma"),
        ("calibrate: {a: {b: 1}}", "takes plain values"),
        ("&a [*a]", "--config"),
    ],
)
def test_a_bad_config_is_one_line(llama: Path, tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    code, out, err = tiny.in_process("upcycle", llama, tmp_path / "moe", "--config", config)
    assert code in (1, 2)
    assert out == ""
    assert expected in err
    assert len(err.splitlines()) == 1, err


def test_a_config_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    code, _, err = tiny.in_process("inspect", "x", "--config", tmp_path / "none.yaml")
    assert code == 1
    assert "no such file" in err
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    code, _, err = tiny.in_process("inspect", "x", "--config", tmp_path / "binary.yaml")
    assert code == 1
    assert "not UTF-8" in err


def test_a_bug_shows_its_traceback_and_its_own_exit_code(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    monkeypatch.setattr("moetool.lineage.read_lineage", lambda folder: 1 / 0)
    code, _, err = tiny.in_process("inspect", llama)
    assert code == 70
    assert "ZeroDivisionError" in err
    assert "bug" in err


def test_a_reader_that_leaves_a_pipe_is_no_error(llama: Path) -> None:
    command = f"{sys.executable} -m moetool inspect {llama} --tensors | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_inspect_counts_what_transformers_counts(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for folder in (llama, mixtral):
        code, out, _ = tiny.in_process("inspect", folder, "--json", "--tensors")
        document = json.loads(out)
        assert code == 0
        assert document["parameters"]["total"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
        assert len(document["tensors"]) == document["num_tensors"]
    # 4 experts of 3 x 32 x 64 in 2 layers, 2 of them active.
    assert document["parameters"]["total"] - document["parameters"]["active"] == 2 * 2 * 3 * 32 * 64
    assert (document["num_experts"], document["top_k"]) == (4, 2)


def test_markup_in_a_name_is_shown_as_text(tmp_path: Path) -> None:
    folder, out = tiny.save_llama(tmp_path / "[red]dense"), tmp_path / "[bold]moe[/]"
    code, text, _ = tiny.in_process("upcycle", folder, out)
    assert code == 0
    assert str(out) in "".join(text.split())
    code, text, _ = tiny.in_process("inspect", out)
    assert str(folder) in "".join(text.split())


def test_moetool_yaml_of_copies_is_a_valid_config_and_the_method_can_be_overridden(llama: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert tiny.in_process("upcycle", llama, first, "--method", "copy", "--quiet")[0] == 0
    again = ("upcycle", "--config", first / "moetool.yaml")
    code, out, err = tiny.in_process(*again, "--json")
    assert code == 0, err
    assert json.loads(out)["already_finished"]
    assert tiny.in_process(*again, llama, tmp_path / "second", "--method", "drop", "--plan")[0] == 0
    third = tmp_path / "third"
    assert tiny.in_process("upcycle", llama, third, "--quiet")[0] == 0
    code, out, err = tiny.in_process(
        "upcycle", "--config", third / "moetool.yaml", "--method", "copy", "--plan", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["redrawn_units"]["per_expert"] == 0


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [(">&-", 0, ""), ("| true; exit ${PIPESTATUS[0]}", 0, ""), (">/dev/full", 1, "no space left on device")],
)
@pytest.mark.parametrize("flag", ["--json", "--tensors"])
def test_a_standard_output_that_is_shut_or_full(
    llama: Path, redirection: str, code: int, message: str, flag: str
) -> None:
    command = f"{sys.executable} -m moetool inspect {llama} {flag} {redirection}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == bool(message), done.stderr


def test_a_name_that_is_not_utf_8_is_shown(llama: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.symlink(llama, folder)
    env = os.environ | {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
    for flag in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "moetool", "inspect", folder, *flag], capture_output=True, check=False, env=env
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == os.fsdecode(folder)


def test_a_config_nested_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 20_000)
    code, _, err = tiny.in_process("inspect", "x", "--config", tmp_path / "deep.yaml")
    assert code == 1
    assert "nested too deeply" in err


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "architectures", 5),
        ("config.json", "num_local_experts", 0),
        ("config.json", "num_local_experts", None),
        ("config.json", "num_experts_per_tok", "two"),
        ("config.json", "model_type", ["mixtral"]),
        ("moetool.json", "lineage", [{"command": "upcycle", "recipe": []}]),
        ("moetool.json", "lineage", [{"command": "upcycle", "source": "there"}]),
        ("moetool.json", "lineage", [{"command": "upcycle", "redrawn_units": {"a": 1}}]),
    ],
)
def test_inspect_of_a_hostile_folder_is_no_bug(
    mixtral: Path, tmp_path: Path, file: str, key: str, value: object
) -> None:
    folder = Path(shutil.copytree(mixtral, tmp_path / "m"))
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {key: value}))
    code, _, err = tiny.in_process("inspect", folder)
    assert code in (0, 1), err
    assert len(err.splitlines()) == code


def test_what_is_not_a_number_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from moetool.commands.console import Console

    context = typer.Context(typer.main.get_command(app))
    Console(context, json=True, quiet=False).result({"a": [float("nan"), 1.5], "b": {"c": float("-inf")}})
    assert json.loads(capsys.readouterr().out, parse_constant=lambda name: 1 / 0) == {
        "a": [None, 1.5],
        "b": {"c": None},
    }


def test_a_permission_is_not_recorded() -> None:
    from moetool.commands.options import Output
    from moetool.commands.proof import Writing
    from moetool.evaluate.settings import Settings
    from moetool.option import options
    from moetool.train.config import TrainConfig

    every = [pair for config in (Writing, Settings, TrainConfig, Output) for pair in options(config).items()]
    unrecorded = {name for name, declared in every if not declared.recorded}
    assert unrecorded == {"overwrite", "plan", "allow_code_execution", "resume", "json", "quiet", "config"}


def test_a_learning_rate_cannot_end_above_its_peak(llama: Path, tmp_path: Path) -> None:
    code, _, err = tiny.in_process(
        "cpt", llama, tmp_path / "o", "--train", "a=b", "--max-steps", "1", "--lr", "1e-4", "--min-lr", "1e-3"
    )
    assert code == 2
    assert "--min-lr" in err
