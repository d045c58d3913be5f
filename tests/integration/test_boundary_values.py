"""Values of an option that leave another one without effect: refused, or told in a line."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moetool.train.config import TrainConfig
from moetool.train.run_plan import unreached
from tests import tiny

REPLAY = ("--max-steps", 1, "--replay", "old=x.txt")
REFUSED = [
    ("cpt", (*REPLAY, "--teacher", "t", "--teacher-weight", 0), "--teacher has no effect with --teacher-weight 0"),
    ("cpt", ("--max-steps", 1, "--balance", "loss-free", "--balance-end", 0), "--balance-end 0: loss-free would never"),
    ("upcycle", ("--drop-units", "least-used", "--drop-ratio", 1), "--drop-units has no effect with --drop-ratio 1"),
    ("upcycle", ("--drop-units", "least-used", "--method", "noise", "--noise-ratio", 1), "with --noise-ratio 1"),
    ("eval", ("--text", "t=x.txt", "--num-fewshot", 3), "--num-fewshot has no effect without --tasks or --suite"),
    ("plan", ("--sweep", "top-k=2,4,2"), "--sweep top-k: 2 is given twice"),
]


@pytest.mark.parametrize(("command", "options", "line"), REFUSED, ids=[line for _, _, line in REFUSED])
def test_what_would_have_no_effect_is_refused(
    command: str, options: tuple[object, ...], line: str, llama: Path, tmp_path: Path
) -> None:
    folders = {"cpt": (llama, tmp_path / "out", "--train", "new=x.txt"), "upcycle": (llama, tmp_path / "out")}
    code, _, err = tiny.in_process(command, *folders.get(command, (llama,)), *options)
    assert code in (1, 2), err
    assert line in " ".join(err.split())


TOLD = [
    (("--top-k", 8), "--top-k 8 sends every token to all 8 experts"),
    (("--drop-ratio", "0.01"), "--method drop changes no unit here, so experts start as with --method copy"),
    (("--router-std", 0), "--router-std 0 sends every token to the same first experts"),
    (("--num-experts", 2, "--top-k", 1), "use --top-k 2 and --num-experts 4\n"),
    (("--granularity", 2, "--num-experts", 2, "--top-k", 2), "use --top-k 4 and --num-experts 8\n"),
]
USUAL = [
    ("--top-k", 7),
    ("--drop-ratio", "0.02"),
    ("--drop-ratio", "0"),
    ("--method", "copy"),
    ("--method", "scratch"),
    ("--method", "noise"),
]


@pytest.mark.parametrize(("options", "line"), TOLD, ids=[line for _, line in TOLD])
def test_upcycle_says_what_leaves_nothing_to_do(
    options: tuple[object, ...], line: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "out", *options, "--plan")
    assert code == 0
    assert line in err


@pytest.mark.parametrize("options", USUAL, ids=[" ".join(map(str, options)) for options in USUAL])
def test_upcycle_has_nothing_to_say_about_usual_values(
    options: tuple[object, ...], llama: Path, tmp_path: Path
) -> None:
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "out", *options, "--plan")
    assert (code, err) == (0, "")


def test_a_result_that_sends_every_token_to_all_experts_says_so(mixtral: Path, jsonl: Path, tmp_path: Path) -> None:
    small = ("--data", f"t={jsonl}", "--max-tokens", 200, "--seq-len", 16, "--device", "cpu")
    commands: dict[str, tuple[object, ...]] = {
        "prune": ("--keep-experts", 2, *small),
        "grow": ("--num-experts", 8, "--start", "twins", "--top-k", 8),
    }
    told = {}
    for command, options in commands.items():
        code, _, err = tiny.in_process(command, mixtral, tmp_path / "out", *options, "--plan")
        assert code == 0, err
        told[command] = " ".join(err.split())
    assert "--keep-experts 2 sends every token to all experts" in told["prune"]
    assert "--top-k 8 sends every token to all experts" in told["grow"]


def test_an_average_of_one_checkpoint_is_called_a_copy(llama: Path, tmp_path: Path) -> None:
    code, _, err = tiny.in_process("average", tmp_path / "out", llama, "--plan")
    assert code == 0
    assert "is averaged, so the result is a copy of it" in " ".join(err.split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"warmup_steps": 4}, ["all 4 steps are warm-up, so the learning rate only rises; lower --warmup-steps or"]),
        ({"warmup_steps": 3, "keep_weights": 4}, []),
        (
            {"replay": {"o": "x"}, "replay_ratio": Decimal(1)},
            ["--replay-ratio 1 never reads --train; give a smaller one"],
        ),
        ({"keep_weights": 5}, ["--keep-weights 5 keeps no snapshot in 4 steps; give at most that"]),
    ],
)
def test_a_run_that_never_reaches_what_an_option_asks_says_so(options: dict[str, Any], told: list[str]) -> None:
    config = TrainConfig(Path("m"), Path("o"), {"t": "x"}, max_steps=4, **options).resolve(128, {}, False)
    found = unreached(config)
    assert len(found) == len(told)
    assert all(line in one for line, one in zip(told, found, strict=True))
