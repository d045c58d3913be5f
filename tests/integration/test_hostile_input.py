"""Every command on hostile folders and files: one line, no code, no pickle, nothing written elsewhere."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests import tiny
from tests.fuzz.mutate import DEEP, TEXTS, dump, mutate
from tests.hostile import hold, in_child, is_control, moetool

EVIL = "\x1b[31mred\x1b[0m\u202e[bold]x[/bold]\n<script>alert(1)</script>"


@pytest.fixture(scope="module", autouse=True)
def imported(llama: Path, mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Libraries are imported here, once, and not in each forked child."""
    folder = tmp_path_factory.mktemp("warm")
    text = tiny.save_jsonl(folder / "text.jsonl")
    size = ["--seq-len", 8, "--global-batch-size", 1, "--max-steps", 1]
    assert tiny.in_process("cpt", llama, folder / "cpt", "--train", f"a={text}", *size)[0] == 0
    assert tiny.in_process("analyze-routing", mixtral, "--data", f"a={text}", "--out", folder / "a")[0] == 0
    assert tiny.in_process("eval", mixtral, "--text", f"a={text}", "--limit", 1, "--out", folder / "e")[0] == 0


def copy(source: Path, target: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other keys in its config.json."""
    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_bytes(dump(json.loads(path.read_text()) | config))
    return target


def commands(folder: Path, tmp_path: Path, only: str = "") -> dict[str, list[object]]:
    """Every command that opens a checkpoint, on one."""
    text = tmp_path / "text.jsonl"
    if not text.exists():
        tiny.save_jsonl(text, repeat=3)
    size = ["--seq-len", 8, "--global-batch-size", 1, "--max-steps", 1]
    every: dict[str, list[object]] = {
        "inspect": [folder, "--json", "--tensors"],
        "upcycle": [folder, tmp_path / "out-upcycle", "--num-experts", 2],
        "verify": [folder],
        "tokenize": [text, "--out", tmp_path / "out-tokens", "--tokenizer", folder],
        "cpt": [folder, tmp_path / "out-cpt", "--train", f"a={text}", *size],
        "analyze-routing": [folder, "--data", f"a={text}", "--out", tmp_path / "out-report", "--max-tokens", 64],
        "eval": [folder, "--text", f"a={text}", "--limit", 1, "--out", tmp_path / "out-eval"],
    }
    return {name: [name, *arguments] for name, arguments in every.items() if name in (only.split() or every)}


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_no_code_of_a_checkpoint_runs(llama: Path, tmp_path: Path, model_type: str) -> None:
    marker = tmp_path / "ran"
    auto = {
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model",
        "AutoTokenizer": ["evil.Slow", "evil.Fast"],
    }  # fmt: skip
    folder = copy(llama, tmp_path / "m", model_type=model_type, auto_map=auto, trust_remote_code=True)
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Config: pass\nModel = Slow = Fast = Config\n"
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (folder / name).write_text(code)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": auto, "tokenizer_class": "Fast", "trust_remote_code": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for arguments in commands(folder, tmp_path).values():
        hold(moetool(*arguments))
        assert not marker.exists(), arguments[0]
    # What is written carries none of it on.
    for out in tmp_path.glob("out-*"):
        assert not list(out.rglob("*.py")), out
        assert not any(
            "auto_map" in json.loads(p.read_text()) for p in out.glob("config.json") if out.name == "out-upcycle"
        )


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/evil", {"": "owner/name@main:fn"}])
def test_a_kernel_that_config_json_names_is_not_fetched(llama: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = copy(llama, tmp_path / "m", **{key: value})
    for arguments in commands(folder, tmp_path, "cpt eval tokenize").values():
        outcome = hold(moetool(*arguments))
        assert outcome.code == 1
        assert "code from elsewhere" in outcome.err


def test_no_pickle_is_loaded(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps(Marker(marker))
    names = [
        "pytorch_model.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
        "vocab.pkl", "vocab.pt", "model.npy", "training_state/optimizer.pt", "random_states_0.pkl", "adapter_model.bin",
    ]  # fmt: skip
    for number, (source, with_weights) in enumerate([(llama, True), (llama, False), (mixtral, False)]):
        folder = copy(source, tmp_path / f"m{number}", tokenizer_class="TransfoXLTokenizer")
        (folder / "training_state").mkdir()
        for name in names:
            (folder / name).write_bytes(evil)
        if not with_weights:
            (folder / "model.safetensors").unlink()
            index = {"weight_map": {"lm_head.weight": "pytorch_model.bin"}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        place = tmp_path / f"{number}"
        place.mkdir()
        for arguments in commands(folder, place).values():
            outcome = hold(moetool(*arguments))
            assert not marker.exists(), arguments[0]
            assert with_weights or outcome.code == 1 or arguments[0] == "tokenize"
    data = tmp_path / "data"
    data.mkdir()
    for name in ("data.npy", "data.pkl", "dataset_info.json", "state.json"):
        (data / name).write_bytes(evil)
    hold(moetool("tokenize", data, "--out", tmp_path / "t", "--tokenizer", llama))
    assert not marker.exists()


FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "moetool.json", "tokenizer.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "what", ["pipe", "device", *(pytest.param(w, marks=pytest.mark.slow) for w in ("loop", "folder", "dangling"))]
)
def test_what_is_no_file_is_not_read(mixtral: Path, tmp_path: Path, name: str, what: str) -> None:
    folder = copy(mixtral, tmp_path / "m")
    path = folder / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": str(path), "dangling": "nowhere"}[what])
    for command, arguments in commands(folder, tmp_path, "inspect eval tokenize").items():
        outcome = hold(moetool(*arguments, seconds=30))
        assert outcome.megabytes < 300, command


HUGE: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**12},
    "many layers": {"num_hidden_layers": 90_000},
    "vocabulary": {"vocab_size": 10**9},
    "experts": {"num_local_experts": 10**9},
    "top-k": {"num_experts_per_tok": 10**400},
    "labels": {"num_labels": 10**9},
    "units": {"intermediate_size": 10**7},
    "depth": {"rope_parameters": next(text for text, depth in DEEP.items() if depth == 900)},
}


@pytest.mark.parametrize("name", HUGE)
def test_numbers_take_no_memory_that_the_files_do_not_hold(mixtral: Path, tmp_path: Path, name: str) -> None:
    folder = copy(mixtral, tmp_path / "m", **HUGE[name])
    for command, arguments in commands(folder, tmp_path, "inspect analyze-routing cpt").items():
        outcome = hold(moetool(*arguments, seconds=30))
        assert outcome.megabytes < 300, command
        assert outcome.code == 1 or command == "inspect" or name == "labels", command


def test_headers_claim_what_they_like(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    for claim in (2**62, 2**63 - 9, 99_999_999, 0):
        (folder / "model.safetensors").write_bytes(claim.to_bytes(8, "little") + b"{}")
        outcome = hold(moetool("inspect", folder))
        assert outcome.code == 1
        assert outcome.megabytes < 50
    # Products of thousands of long numbers would take hours.
    numbers = [10**4000] * 1000
    header = dump({"x": {"dtype": "F32", "shape": numbers, "data_offsets": [0, 4]}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert hold(moetool("inspect", folder, seconds=20)).code == 1


def test_a_number_as_long_as_can_be_read_is_told_in_one_line(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m")
    header = dump({"x": {"dtype": "F32", "shape": [1], "data_offsets": [int("9" * 4299), int("9" * 4300)]}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert len(hold(moetool("inspect", folder)).err) < 2100


YAML = {
    "bomb": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 20)}]\n" for i in range(1, 30)),
    "bomb of a flag": "moe-layers: &a [x]\ndonor: [*a, *a]\n",
    "code": "method: !!python/object/apply:os.mkdir ['MARKER']\n",
    "code in a key": "? !!python/object/apply:os.mkdir ['MARKER']\n: x\n",
    "loop": "donor: &a [*a]\n",
    "deep": "a: " + "[" * 100_000,
    "deep mapping": "a: " + "{a: " * 50_000,
    "nul": "method: 'a\x00b'\n",
    "escaped nul": 'dense: "a\\0b"\n',
    "half character": 'dense: "\\uD800"\n',
    "not utf-8": "method: \udcff\n",
    "large": "a: b\n" * 500_000,
    "long number": f"num-experts: {'9' * 100_000}\n",
    "long size": f"max-shard-size: {'9' * 4000}GB\n",
    "exponent": "drop-ratio: 1e-999999999\nrouter-std: 1e999999999\n",
    "many workers": f"workers: {'9' * 400}\n",
    "escapes": 'method: "\\e[31m"\n"\\e[2J": 1\n',
    "nothing but a tag": "!!python/name:os.system",
}


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_configuration_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "c.yaml"
    path.write_bytes(YAML[name].replace("MARKER", str(marker)).encode(errors="surrogateescape"))
    outcome = hold(moetool("upcycle", "--config", path, llama, tmp_path / "o", "--plan", seconds=30))
    assert outcome.megabytes < 100
    assert not marker.exists()


@pytest.mark.parametrize(
    "line", ["endless", "deep", "digits", "half character", "nul", "not utf-8", "no end", "many keys"]
)
def test_hostile_lines_of_json(llama: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    lines = {
        "deep": b'{"text": ' + b"[" * 10**6, "digits": b'{"text": ' + b"9" * 10**6 + b"}",
        "half character": b'{"text": "\\ud800 \\udfff x"}', "nul": b'{"text": "a\\u0000b"}\x00',
        "not utf-8": b'{"text": "\xff"}', "no end": b'{"text": "' + b"x" * 10**6, "many keys": b'{"a":1,' * 10**5,
    }  # fmt: skip
    if line == "endless":  # no line break in 300 MB, of which the disk holds none
        with path.open("wb") as file:
            file.truncate(300_000_000)
    else:
        path.write_bytes(lines[line])
    outcome = hold(moetool("tokenize", path, "--out", tmp_path / "o", "--tokenizer", llama, megabytes=1200))
    assert outcome.code == int(line != "half character")
    assert line != "endless" or "line 1: longer than" in outcome.err


def test_control_characters_and_markup_in_names_are_shown(llama: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(
        json.dumps(
            {EVIL: {"0": [8, 0]}, "$\\frac{$" * 3: {"0": [4, 4]}, "x" * 300: {"0": [2, 2]}, "../..": {"0": [1, 1]}}
        )
    )
    before = set(tmp_path.iterdir())
    for json_flag in ([], ["--json"]):
        out = tmp_path / f"report{len(json_flag)}"
        outcome = hold(moetool("analyze-routing", "--counts", counts, "--top-k", 1, "--out", out, *json_flag))
        assert outcome.code == 0
        shown = json.loads(outcome.out)["domains"] if json_flag else outcome.out
        assert EVIL in shown if json_flag else "\\x1b" in shown
        page = (out / "report.html").read_text()
        assert "<script>alert" not in page
        assert not {c for c in page if is_control(c) and c != "\u00ad"}
        assert all(path.parent == out / "plots" for path in out.rglob("*.png"))
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report0", tmp_path / "report1"}


@pytest.mark.parametrize("command", ["inspect", "tokenize", "cpt", "eval", "upcycle", "analyze-routing"])
def test_names_of_files_cannot_act_on_a_terminal(llama: Path, tmp_path: Path, command: str) -> None:
    name = EVIL.replace("/", "|")
    model = copy(llama, tmp_path / name, model_type=EVIL if command != "inspect" else "llama")
    hold(moetool(*commands(model, tmp_path)[command]))
    text = shutil.copy(tiny.save_jsonl(tmp_path / "text.jsonl"), tmp_path / f"{name}.jsonl")
    tokenizer = copy(llama, tmp_path / "sound")
    out = tmp_path / f"out {name}"
    size = ["--seq-len", 8, "--global-batch-size", 1, "--max-steps", 1]
    arguments: dict[str, list[object]] = {
        "inspect": [tmp_path / f"absent {name}"],
        "tokenize": [text, "--out", out, "--tokenizer", tokenizer],
        "cpt": [tokenizer, out, "--train", f"{name}={text}", *size],
        "eval": [tokenizer, "--text", f"{name}={text}", "--limit", 1, "--out", out],
        "upcycle": [tokenizer, out, "--num-experts", 2],
        "analyze-routing": [tokenizer, "--data", f"{name}={text}", "--out", out],
    }
    outcome = hold(moetool(command, *arguments[command]))
    assert outcome.code == int(command in ("inspect", "analyze-routing"))


def test_lineage_and_tensor_names_cannot_act_on_a_terminal(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m", architectures=[EVIL], model_type=EVIL, num_hidden_layers=EVIL, vocab_size=EVIL)
    (folder / "moetool.json").write_text(
        json.dumps({"lineage": [{"command": EVIL}, {"command": "cpt", "steps": EVIL}]})
    )
    header = dump({EVIL: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert hold(moetool("inspect", folder, "--tensors")).code == 0
    assert "\\u202e" in hold(moetool("inspect", folder, "--tensors", "--json")).out
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert hold(moetool("inspect", folder)).code == 1


def test_an_error_is_no_longer_than_a_screen(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path / "m", rope_parameters=["x" * 100_000])
    assert len(hold(moetool("upcycle", folder, tmp_path / "o", "--plan")).err) < 2100


def links(folder: Path, victim: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(victim)
    return folder


def test_nothing_is_written_where_links_in_out_lead(llama: Path, mixtral: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    text = tiny.save_jsonl(tmp_path / "text.jsonl")
    names = ["report.json", "report.html", "moetool.yaml", "results.json", "plots/mri.png"]
    names += [f"{name}.unfinished" for name in names]
    report = links(tmp_path / "report", victim, names)
    assert hold(moetool("analyze-routing", mixtral, "--data", f"a={text}", "--out", report)).code == 0
    scores = links(tmp_path / "scores", victim, names)
    assert hold(moetool("eval", llama, "--text", f"a={text}", "--limit", 1, "--out", scores)).code == 0
    out = tmp_path / "up"
    assert hold(moetool("upcycle", llama, out, "--num-experts", 2)).code == 0
    (out / "model.safetensors").unlink()
    shards = [
        "model.safetensors",
        "model.safetensors.unfinished",
        "config.json.unfinished",
        "moetool.partial.json.unfinished",
    ]
    links(out, victim, [*shards, "moetool.yaml.unfinished"])
    assert hold(moetool("upcycle", llama, out, "--num-experts", 2, "--overwrite")).code == 0
    assert victim.read_text() == "precious"
    assert not victim.is_symlink()


def test_links_in_a_run_are_taken_away_not_followed(llama: Path, tmp_path: Path) -> None:
    text, out, elsewhere = tiny.save_jsonl(tmp_path / "text.jsonl"), tmp_path / "run", tmp_path / "elsewhere"
    size = ["--seq-len", 8, "--global-batch-size", 1, "--save-every", 1]
    run = ["cpt", llama, out, "--train", f"a={text}", *size]
    assert hold(moetool(*run, "--max-steps", 2)).code == 0
    shutil.move(out / "checkpoints", elsewhere)
    (out / "checkpoints").symlink_to(elsewhere)
    kept = sorted(path.name for path in elsewhere.iterdir())
    assert hold(moetool(*run, "--max-steps", 3, "--no-resume")).code == 0
    assert sorted(path.name for path in elsewhere.iterdir()) == kept or not list(elsewhere.iterdir())
    assert (out / "checkpoints" / "step-000003").is_dir()


def test_a_pipe_among_texts_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    os.mkfifo(folder / "a.txt")
    outcome = hold(moetool("tokenize", folder, "--out", tmp_path / "o", "--tokenizer", llama, seconds=20))
    assert outcome.code == 1
    assert "neither a file nor a folder" in outcome.err


def test_counts_take_no_more_than_their_file_justifies(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for document in (
        {"a": {"0": [1] * 100_000}},
        {"a": {str(i): [1] * 4096 for i in range(200)}},
        {"a": {"9" * 5000: [1]}},
    ):
        path.write_text(json.dumps(document))
        outcome = hold(moetool("analyze-routing", "--counts", path, "--top-k", 1, "--out", tmp_path / "o"))
        assert outcome.code == 1
        assert outcome.megabytes < 200
    path.write_text(json.dumps({"a": {str(i): [1] * 4096 for i in range(2)}}))
    assert hold(moetool("analyze-routing", "--counts", path, "--top-k", 1, "--out", tmp_path / "o")).megabytes < 400


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "moetool.json", "tokenizer_config.json", "model.safetensors"])
def test_hundreds_of_hostile_checkpoints(llama: Path, tmp_path: Path, name: str) -> None:
    """Each variant through every command that opens a checkpoint: 7 command lines each."""
    upcycled = tmp_path / "upcycled"
    assert hold(moetool("upcycle", llama, upcycled, "--num-experts", 2)).code == 0
    random, secret = Random(name), tmp_path / "secret"
    secret.write_text("precious")
    for number in range(25):
        place = tmp_path / str(number)
        place.mkdir()
        folder = Path(shutil.copytree(upcycled if number % 2 else llama, place / "m"))
        seed = (upcycled / name).read_bytes()
        if name == "model.safetensors":
            length = int.from_bytes(seed[:8], "little")
            header = mutate(seed[8 : 8 + length], random)
            seed = len(header).to_bytes(8, "little") + header + seed[8 + length :]
            (folder / name).write_bytes(seed)
        else:
            (folder / name).write_bytes(mutate(seed, random))
        for arguments in commands(folder, place).values():
            hold(moetool(*arguments, megabytes=1500))
        allowed = {"m", "text.jsonl"} | {path.name for path in place.glob("out-*")}
        assert {path.name for path in place.iterdir()} == allowed
        shutil.rmtree(place)
    assert secret.read_text() == "precious"


def test_every_text_is_shown_without_effect() -> None:
    from moetool.commands.console import escape
    from moetool.outside import printable, printable_json

    for text in TEXTS:
        assert not {c for c in printable(text) + escape(text) if is_control(c) or c in "\n\r"}
        shown = printable_json(json.dumps(text, ensure_ascii=False))
        assert not {c for c in shown if is_control(c)}
        assert json.loads(shown) == text
    assert printable("plain é 日本") == "plain é 日本"
    assert re.fullmatch(r"a\\x1b\[1m\\nb", printable("a\x1b[1m\nb"))


def test_a_child_that_hangs_or_grows_is_noticed() -> None:
    """The harness itself: what it would say of a defect."""
    assert in_child(lambda: 70).code == 70
    with pytest.raises(AssertionError, match="exit -14"):
        hold(in_child(lambda: time.sleep(30) or 0, seconds=1))  # type: ignore[func-returns-value]
    with pytest.raises(AssertionError, match="MemoryError"):
        hold(in_child(lambda: len(bytearray(2**31)), megabytes=100))
