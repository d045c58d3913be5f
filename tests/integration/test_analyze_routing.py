"""The command `moetool analyze-routing`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.tiny import cli, in_process


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The router sends each token to two experts.\n" * 60, encoding="utf-8")
    return path


def test_report_in_a_process_of_its_own(mixtral: Path, jsonl: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = cli("analyze-routing", mixtral, "--data", f"a={jsonl}", "--data", f"b={text}", "--out", out, "--json")
    assert run.returncode == 0, run.stderr
    printed = json.loads(run.stdout)
    written = json.loads((out / "report.json").read_text())
    assert written == {key: value for key, value in printed.items() if key != "files"}
    assert written["model"] == str(mixtral)
    assert {name: len(domain["layers"]) for name, domain in written["domains"].items()} == {"a": 2, "b": 2}
    assert written["vocabulary_specialization"]["layers"][0]["experts"][0]["tokens"][0]["text"]
    assert printed["files"]["html"] == str(out / "report.html")
    assert {path.name for path in out.iterdir()} == {"report.json", "report.html", "plots", "moetool.yaml"}
    assert "Traceback" not in run.stderr


def test_table_and_options_file(mixtral: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--seq-len", "32", "--batch-size", "2", "--max-tokens", "0.1k", "--vocabulary-layers", "1")
    code, printed, _ = in_process("analyze-routing", mixtral, "--data", f"b={text}", "--out", out, *flags)
    assert code == 0
    assert "entropy" in printed
    assert "The report is" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["domains"]["b"]["num_tokens"] == 100
    assert [row["layer"] for row in report["vocabulary_specialization"]["layers"]] == [1]
    assert yaml.safe_load((out / "moetool.yaml").read_text())["vocabulary-layers"] == "1"
    again = tmp_path / "again"
    code, _, errors = in_process("analyze-routing", "--config", out / "moetool.yaml", "--out", again)
    assert code == 0, errors
    assert (again / "report.json").read_bytes() == (out / "report.json").read_bytes()


@pytest.mark.parametrize("columns", ["30", "45", "70", "200"])
def test_narrow_terminals(
    mixtral: Path, text: Path, tmp_path: Path, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    data = ("--data", f"a_domain_with_a_long_name={text}", "--data", f"b={text}")
    code, printed, _ = in_process("analyze-routing", mixtral, *data, "--out", tmp_path / "o", "--max-tokens", "64")
    assert code == 0
    table = [line for line in printed.splitlines() if line.lstrip().startswith(("0 ", "1 "))]
    assert len(table) == 2
    assert all("0." in line for line in table)


def test_checks(mixtral: Path, text: Path, tmp_path: Path) -> None:
    def run(*checks: str) -> tuple[int, str]:
        flags = [part for check in checks for part in ("--fail-if", check)]
        out = tmp_path / "o"
        code, _, errors = in_process("analyze-routing", mixtral, "--data", f"b={text}", "--out", out, "--quiet", *flags)
        return code, errors

    assert run("mri>1", "entropy<0", "dead_experts>4") == (0, "")
    code, errors = run("mri >= 0.25", "max-violation<-5")
    assert code == 3
    assert errors.count("\n") == 1
    assert "mri>=0.25 in b: layer 0 (" in errors
    assert "layer 1 (" in errors
    assert "max_violation" not in errors
    assert (tmp_path / "o" / "report.json").is_file()
    assert run("mir>0.6") == (2, errors := run("mir>0.6")[1])
    assert "did you mean 'mri'?" in errors
    assert run("mri=0.6")[0] == 2


def test_comparison(mixtral: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    code, printed, _ = in_process("analyze-routing", mixtral, "--data", f"b={text}", "--out", out, "--compare", mixtral)
    assert code == 0
    assert "100% of the expert choices are the same" in " ".join(printed.split())
    report = json.loads((out / "report.json").read_text())
    assert all(row["saturation"] == 1 for row in report["comparison"]["domains"]["b"]["layers"])
    assert (out / "plots" / "saturation.png").is_file()
    assert "What changed" in (out / "report.html").read_text()


def test_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"en": {"0": [6, 1, 0, 1], "1": [2, 2, 2, 2]}}))
    out = tmp_path / "o"
    code, printed, _ = in_process("analyze-routing", "--counts", path, "--top-k", "1", "--out", out)
    assert code == 0
    assert "Skewed" in printed or "Collapsed" in printed
    assert json.loads((out / "report.json").read_text())["domains"]["en"]["layers"][0]["mri"] == 0.75
    check = ("--fail-if", "balance_loss>1")
    code, _, errors = in_process("analyze-routing", "--counts", path, "--top-k", "1", "--out", out, *check)
    assert code == 1
    assert "cannot be computed from counts" in errors


def test_mistakes(mixtral: Path, llama: Path, text: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        code, _, errors = in_process("analyze-routing", *arguments)
        assert errors.count("\n") == 1, errors
        return code, errors

    data, out = ("--data", f"b={text}"), ("--out", tmp_path / "o")
    assert run(*data, *out)[0] == 2
    assert run(mixtral, *out)[0] == 2
    assert run(mixtral, *data)[0] == 2
    assert run(mixtral, *data, *out, "--top-k", "2")[0] == 2
    assert run(mixtral, *data, *out, "--device", "cpu", "--device-map", "auto")[0] == 2
    assert run(mixtral, *data, *out, "--vocabulary-layers", "5-3")[0] == 2
    assert run("--counts", text, *data, *out)[0] == 2
    assert run("--counts", text, *out)[0] == 2
    assert run("--counts", text, "--top-k", "2", *out)[0] == 1
    assert run(tmp_path / "nowhere", *data, *out)[0] == 1
    assert run(mixtral, "--data", f"b={tmp_path / 'nowhere'}", *out)[0] == 1
    assert run(mixtral, *data, "--out", text)[0] == 1
    assert run(mixtral, *data, "--out", text / "below")[0] == 1
    code, errors = run(llama, *data, *out)
    assert code == 1
    assert "without a router" in errors
    assert not (tmp_path / "o").exists()


def test_another_tokenizer_is_refused(mixtral: Path, text: Path, tmp_path: Path) -> None:
    from tests import tiny

    other = tiny.save_mixtral(tmp_path / "other")
    tiny.save_tokenizer(other, vocab_size=280)
    out = ("--out", tmp_path / "o")
    code, _, errors = in_process("analyze-routing", mixtral, "--data", f"b={text}", *out, "--compare", other)
    assert code == 1
    assert "different tokenizers" in errors


def test_every_kind_of_text_gives_the_same_tokens(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    documents = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "text.parquet")
    assert in_process("tokenize", jsonl, "--out", tmp_path / "tokens", "--tokenizer", mixtral)[0] == 0
    names = {"jsonl": jsonl, "parquet": tmp_path / "text.parquet", "tokens": tmp_path / "tokens"}
    data = [part for name, path in names.items() for part in ("--data", f"{name}={path}")]
    code, _, errors = in_process("analyze-routing", mixtral, *data, "--out", tmp_path / "o", "--max-tokens", "300")
    assert code == 0, errors
    domains = json.loads((tmp_path / "o" / "report.json").read_text())["domains"]
    assert domains["jsonl"] == domains["parquet"] == domains["tokens"]


@pytest.mark.parametrize("flags", [("--device-map", "auto"), ("--device", "cpu", "--dtype", "bfloat16")])
def test_placement_and_precision(mixtral: Path, text: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    data = ("--data", f"b={text}", "--max-tokens", "200")
    plain, other = tmp_path / "plain", tmp_path / "other"
    assert in_process("analyze-routing", mixtral, *data, "--out", plain, "--device", "cpu")[0] == 0
    code, _, errors = in_process("analyze-routing", mixtral, *data, "--out", other, *flags)
    assert code == 0, errors
    first, second = (json.loads((folder / "report.json").read_text())["domains"]["b"] for folder in (plain, other))
    assert second["num_tokens"] == 200
    loads = [[row["load"] for row in found["layers"]] for found in (first, second)]
    if "bfloat16" in flags:
        assert loads[0] == [pytest.approx(load, abs=0.05) for load in loads[1]]
        assert first != second, "the dtype changed nothing"
    else:
        assert loads[0] == loads[1]
