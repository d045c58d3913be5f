"""`moetool sample`: the same text whatever interrupts it, read by cpt as it is."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.forked import Running, start, wait_until

OUT = "self.jsonl"
HIDDEN = ".self.jsonl.unfinished"
SIZE = ("--max-tokens", "0.8k", "--seq-len", 40, "--batch-size", 4)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def done(*arguments: object) -> dict[str, Any]:
    code, out, err = tiny.in_process("sample", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def sampled(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 tokens in batches of 4 samples of at most 40."""
    out = tmp_path_factory.mktemp("sampled") / OUT
    result = done(llama, out, *SIZE)
    written = lines(out)
    assert result["num_tokens"] == 800 == sum(line["num_tokens"] for line in written) + result["num_empty"]
    assert result["num_samples"] == len(written)
    assert result["num_ended"] == sum(line["ended"] for line in written) + result["num_empty"]
    assert all(line["num_tokens"] == 40 for line in written[:-1] if not line["ended"])
    assert all(line.keys() == {"text", "num_tokens", "ended"} for line in written)
    assert not any("<|endoftext|>" in line["text"] for line in written)
    assert not any(line["text"].endswith("\ufffd") for line in written if not line["ended"])
    assert result["num_bytes"] == out.stat().st_size
    return out


def test_a_finished_file_is_left_alone_and_another_is_refused(sampled: Path, llama: Path, mixtral: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in sampled.parent.iterdir()}
    same = (sampled, *SIZE)
    again = done(llama, *same)
    assert again["already_finished"]
    assert again["num_tokens"] == 800
    for change, named in (
        (("--seed", 1), "--seed (0 before, 1 now)"),
        (("--temperature", 0.5), "--temperature (1.0 before, 0.5 now)"),
        (("--seq-len", 64), "--seq-len (40 before, 64 now)"),
        (("--config", f"{sampled}.moetool.yaml", "--batch-size", 5), "--batch-size (4 before, 5 now)"),
    ):
        assert f"was made with other options: {named}; give another OUT" in tiny.refusal(
            "sample", llama, *same, *change
        )
    assert "MODEL (other files)" in tiny.refusal("sample", mixtral, *same)
    assert {path.name: path.stat().st_mtime_ns for path in sampled.parent.iterdir()} == before


def test_the_options_left_beside_it_make_the_same_text(sampled: Path, tmp_path: Path, llama: Path) -> None:
    done(llama, tmp_path / OUT, "--config", f"{sampled}.moetool.yaml")
    assert (tmp_path / OUT).read_bytes() == sampled.read_bytes()
    done(llama, tmp_path / OUT, "--config", f"{sampled}.moetool.yaml", "--seed", 1, "--overwrite")
    assert (tmp_path / OUT).read_bytes() != sampled.read_bytes()


def started(streams: Path, *arguments: object, batches: int) -> Running:
    """A run of the real command that has written so many batches."""
    state = Path(str(arguments[1])).parent / HIDDEN / "state.json"
    running = start(streams, "sample", *arguments)
    wait_until(lambda: state.exists() and json.loads(state.read_text())["done"]["num_batches"] >= batches, running)
    return running


def test_kills_and_interruptions_do_not_change_the_text(
    sampled: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, llama: Path
) -> None:
    out, streams = tmp_path / OUT, tmp_path_factory.mktemp("streams")
    command = (llama, out, *SIZE)
    running = started(streams / "first", *command, batches=1)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert not out.exists()
    with (tmp_path / HIDDEN / "text.jsonl").open("a") as file:
        file.write('{"text": "half a li')
    assert "was begun with other options: --seed (0 before, 3 now)" in tiny.refusal("sample", *command, "--seed", 3)
    running = started(streams / "second", *command, batches=2)
    running.send(signal.SIGINT)
    stopped = running.wait()
    assert stopped.code == 130
    assert "the same command continues from there" in stopped.err
    assert stopped.err.splitlines()[-1] == "moetool: interrupted"
    assert done(*command)["num_tokens"] == 800
    assert out.read_bytes() == sampled.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [OUT, f"{OUT}.moetool.json", f"{OUT}.moetool.yaml"]


def test_prompts_begin_the_samples_and_cpt_reads_the_file(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    out = tmp_path / "own" / OUT
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("\n".join(f"{n} apples and {n + 1} pears" for n in range(9)))
    prompts = ("--prompts", f"text={jsonl}", "--prompts", f"numbers={numbers}", "--document", "line")
    command = (mixtral, out, "--max-tokens", 1500, *prompts, "--prompt-tokens", 6)
    result = done(*command)
    written = lines(out)
    assert {line["prompt"] for line in written} == {"text", "numbers"}
    assert result["num_tokens"] == 1500
    assert result["num_prompt_tokens"] == 6 * result["num_samples"]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(mixtral)
    texts = {"text": [json.loads(line)["text"] for line in jsonl.open()], "numbers": numbers.read_text().splitlines()}
    for line in written:
        starts = [
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:6]) for text in texts[line["prompt"]]
        ]
        assert line["text"].startswith(tuple(starts))
    size = ("--seq-len", 32, "--global-batch-size", 4, "--max-steps", 2)
    # A folder stands for the text in it: what sample has left beside it is no text.
    more = ("--train", f"new={jsonl}", "--replay", f"self={out.parent}", "--json")
    code, printed, err = tiny.in_process("cpt", mixtral, tmp_path / "run", *more, *size)
    assert code == 0, err
    assert json.loads(printed)["ledger"]["self"]["sequences"] > 0
    assert "leaves no room in a sample of 128 tokens" in tiny.refusal("sample", *command[:-1], 128)
    assert "the longest document has" in tiny.refusal("sample", *command[:-1], 99)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("out.txt",), "give a name that ends in .jsonl"),
        (("o.jsonl", "--temperature", 0), "--temperature 0 would write the same text again and again"),
        (("o.jsonl", "--temperature", "inf"), "--temperature inf would draw tokens at random"),
        (("o.jsonl", "--prompt-tokens", 3), "--prompt-tokens has no effect without --prompts"),
        (("o.jsonl", "--document", "line"), "--document has no effect without --prompts"),
        (("o.jsonl", "--device", "cpu", "--device-map", "auto"), "exclude each other"),
    ],
)
def test_options_that_contradict_each_other(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    code, _, err = tiny.in_process("sample", "no-model", *arguments, "--max-tokens", 10)
    assert code == 2
    assert message in err


def test_what_cannot_be_sampled_is_one_line(tmp_path: Path, llama: Path) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("mine")
    assert "exists already" in tiny.refusal("sample", llama, out, "--max-tokens", 10)
    assert out.read_text() == "mine"
    assert "only 128 positions" in tiny.refusal(
        "sample", llama, tmp_path / "p.jsonl", "--max-tokens", 10, "--seq-len", 129
    )
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token"}))
    assert "has no end-of-text token" in tiny.refusal("sample", bare, tmp_path / "p.jsonl", "--max-tokens", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "o.jsonl"]


def test_a_model_that_writes_nothing_is_one_line(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mute(model: Any, prompts_BP: Any, *, end: int, **asked: Any) -> list[list[int]]:
        return [[end]] * len(prompts_BP)

    monkeypatch.setattr("moetool.sample.run.generate", mute)
    assert "ends every text at once" in tiny.refusal("sample", llama, tmp_path / OUT, "--max-tokens", 20)
    assert not list(tmp_path.iterdir())
