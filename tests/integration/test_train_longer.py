"""`moetool cpt` with a larger --max-steps: a run goes on where every step that it has made stays what it was."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from moetool.train import schedules
from tests import tiny
from tests.forked import start, wait_until

SMALL = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--lr", 1e-3]


def command(model: Path, out: Path, text: Path, *more: object, steps: int) -> list[object]:
    return ["cpt", model, out, "--train", f"new={text}", "--max-steps", steps, *SMALL, *more]


def trained(model: Path, out: Path, text: Path, *more: object, steps: int) -> dict[str, Any]:
    code, stdout, stderr = tiny.in_process(*command(model, out, text, *more, "--json", steps=steps))
    assert code == 0, stderr
    document: dict[str, Any] = json.loads(stdout)
    return document | {"stderr": " ".join(stderr.split())}


def refused(model: Path, out: Path, text: Path, *more: object, steps: int) -> str:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = tiny.refusal(*command(model, out, text, *more, steps=steps))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    return line


def rates(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, len(trained) + 1))
    return [row["lr"] for row in trained]


def same(one: Path, other: Path, step: int) -> None:
    """Weights, moments, losses and rates are the same bits."""
    for name in ("model.safetensors", f"checkpoints/step-{step:06d}/training_state/optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    losses = [[row.get("loss") for row in map(json.loads, (out / "metrics.jsonl").open())] for out in (one, other)]
    assert [loss for loss in losses[0] if loss] == [loss for loss in losses[1] if loss]
    assert rates(one) == rates(other)


def test_a_run_that_was_made_longer_twice_is_the_long_run(tmp_path: Path, mixtral: Path, jsonl: Path) -> None:
    options = ["--schedule", "constant", "--warmup-ratio", 0.5, "--val-fraction", 0.1]
    grown, long, again = (tmp_path / name for name in ("grown", "long", "again"))
    first = trained(mixtral, grown, jsonl, *options, "--keep-weights", 2, "--average-last", 1, steps=2)
    assert (grown / "average" / "config.json").exists()
    trained(mixtral, grown, jsonl, *options, "--keep-weights", 2, steps=3)
    assert not (grown / "average").exists()  # of a result that is no more
    last = trained(mixtral, grown, jsonl, *options, "--keep-weights", 2, "--average-last", 2, steps=4)

    # The warm-up is the one that was made: half of 2 steps.
    trained(mixtral, long, jsonl, *options[:2], "--warmup-steps", 1, *options[4:], steps=4)
    same(grown, long, 4)
    assert rates(grown) == [1e-3] * 4
    assert last["steps"] == json.loads((grown / "summary.json").read_text())["steps"] == 4
    assert last["val"]["new"]["before"] == first["val"]["new"]["before"]  # of step 0
    assert last["average"]["steps"] == [2, 4]
    assert json.loads((grown / "moetool.json").read_text())["lineage"][-1]["tokens"] == 4 * 64

    recorded = yaml.safe_load((grown / "moetool.yaml").read_text())
    assert (recorded["max-steps"], recorded["shares-of"]) == (4, 2)
    assert "shares-of" not in yaml.safe_load((long / "moetool.yaml").read_text())
    config = ["--config", grown / "moetool.yaml"]
    code, stdout, _ = tiny.in_process("cpt", mixtral, grown, *config)
    assert code == 0
    assert "already finished: 4 steps" in stdout
    assert tiny.in_process("cpt", mixtral, again, *config)[0] == 0
    same(grown, again, 4)
    code, _, stderr = tiny.in_process("cpt", mixtral, grown, *config, "--max-steps", 3)
    assert code == 1
    assert "other options: --max-steps (4 before, 3 now). Repeat" in stderr


def test_the_cooldown_of_infinite_stays_and_its_constant_phase_grows(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    options = ["--schedule", "infinite", "--min-lr", 1e-4, "--constant-lr", 4e-4, "--warmup-steps", 1]
    options += ["--cooldown-end", 0.375, "--constant-end", 0.75, "--val-fraction", 0]
    options += ["--save-every", 6, "--keep-checkpoints", 9]
    out = tmp_path / "out"
    trained(llama, out, jsonl, *options, steps=8)
    # Warm-up 1, cooldown to update 3, constant to 6, then 4e-4 * (1 / 4) ** share.
    assert rates(out) == pytest.approx([1e-3, 7e-4, 4e-4, 4e-4, 4e-4, 4e-4, 2e-4, 1e-4], rel=1e-12)
    step = out / "checkpoints" / "step-000006"
    assert refused(llama, out, jsonl, *options, steps=12) == (
        f"moetool: {out} cannot continue to 12 steps. It has made 8 of 8 steps, and in a longer run their"
        f" learning rate would differ from step 7 on. Start a run in another OUT from {step}, the last step folder"
        f" before that, with --keep-optimizer --warmup-steps 0 --cooldown-end 0; or from {out} with a new warm-up"
    )
    # Without what was made in the decay, the run can go on: constant to 9 of 12 steps, the cooldown where it was.
    shutil.rmtree(out / "checkpoints" / "step-000008")
    trained(llama, out, jsonl, *options, steps=12)
    decay = [4e-4 * 4 ** (-share) for share in (1 / 3, 2 / 3, 1)]
    assert rates(out) == pytest.approx([1e-3, 7e-4, *[4e-4] * 7, *decay], rel=1e-12)


def test_the_end_of_a_constant_run_may_be_chosen_later(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    options = ["--warmup-steps", 1, "--val-fraction", 0]
    out, straight = tmp_path / "out", tmp_path / "straight"
    trained(llama, out, jsonl, *options, "--schedule", "constant", steps=3)
    decay = ["--schedule", "wsd", "--constant-end", 0.5, "--min-lr", 0, "--decay-shape", "minus-sqrt"]
    told = trained(llama, out, jsonl, *options, *decay, steps=6)
    assert (
        "from step 3 on, this run has other options: --schedule (constant before, wsd now); --min-lr (none before,"
        " 0 now); --constant-end (none before, 0.5 now); --decay-shape (none before, minus-sqrt now)"
    ) in told["stderr"]
    trained(llama, straight, jsonl, *options, *decay, steps=6)
    same(out, straight, 6)
    assert rates(out)[3:] == pytest.approx([1e-3 * (1 - 0.5773502691896258), 1e-3 * (1 - 0.816496580927726), 0])


@pytest.mark.parametrize(
    ("options", "more", "steps", "told"),
    [
        ([], [], 6, "their learning rate would differ from step 2 on. Start a run in another OUT from"
         " {out} with a new warm-up"),
        (["--schedule", "wsd"], [], 6, "their learning rate would differ from step 4 on"),
        (["--schedule", "constant"], ["--lr", 5e-4], 6, "other options: --lr (0.001 before, 0.0005 now). Repeat"),
        (["--schedule", "constant"], ["--seed", 1], 6, "other options: --seed (0 before, 1 now). Repeat"),
        (["--schedule", "constant"], ["--schedule", "wsd", "--constant-end", 0.5], 5, "other options: --schedule (con"),
        (["--schedule", "constant"], [], 3, "other options: --max-steps (4 before, 3 now). Repeat"),
    ],
)  # fmt: skip
def test_a_run_that_would_have_been_another_is_refused(
    tmp_path: Path, llama: Path, jsonl: Path, options: list[object], more: list[object], steps: int, told: str
) -> None:
    out, fixed = tmp_path / "out", ["--warmup-steps", 1, "--val-fraction", 0]
    trained(llama, out, jsonl, *options, *fixed, steps=4)
    assert told.format(out=out) in refused(llama, out, jsonl, *options, *fixed, *more, steps=steps)


def test_a_run_of_an_earlier_version_or_without_step_folders(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    out, options = tmp_path / "out", ["--schedule", "constant", "--warmup-ratio", 0.5, "--val-fraction", 0]
    trained(llama, out, jsonl, *options, steps=2)
    state = out / "checkpoints" / "step-000002" / "training_state" / "state.json"
    document = json.loads(state.read_text())
    for name in ("shares-of", "decay-shape"):
        document["identity"].pop(name, None)
    state.write_text(json.dumps(document))
    trained(llama, out, jsonl, *options, steps=3)
    assert rates(out) == [1e-3] * 3
    assert yaml.safe_load((out / "moetool.yaml").read_text())["shares-of"] == 2
    for name, value in {"schedule": "of my own", "lr": "high", "weight": ["new"], "warmup-steps": None}.items():
        damaged = document | {"files": {}, "identity": document["identity"] | {"max-steps": 3, name: value}}
        for folder in (out / "checkpoints").iterdir():
            (folder / "training_state" / "state.json").write_text(json.dumps(damaged))
        line = refused(llama, out, jsonl, *options, steps=4)
        assert "holds a run with other options: " in line
        assert f"--{name} (" in line
    shutil.rmtree(out / "checkpoints")
    assert refused(llama, out, jsonl, *options, steps=4) == (
        f"moetool: {out} is finished after 3 steps and cannot continue to 4, because {out}/checkpoints no longer"
        f" holds a step folder. Start a run in another OUT from {out}, with a new warm-up"
    )


def test_a_killed_longer_run_is_no_result_and_goes_on(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    options = ["--schedule", "constant", "--warmup-steps", 1, "--save-every", 3, "--val-fraction", 0]
    out, long = tmp_path / "out", tmp_path / "long"
    trained(llama, out, jsonl, *options, steps=2)
    (out / "notes.txt").write_text("the user's own")
    running = start(tmp_path / "first", *command(llama, out, jsonl, *options, steps=4000))
    wait_until((out / "checkpoints" / "step-000006").exists, running, 120)
    running.send(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert not any(
        (out / name).exists() for name in ("config.json", "summary.json", "moetool.json", "model.safetensors")
    )
    assert (out / "moetool.partial.json").exists()
    for arguments in (["inspect", out], ["verify", out], ["cpt", out, tmp_path / "next", "--train", f"a={jsonl}"]):
        line = tiny.refusal(*arguments, *(["--max-steps", 1] if arguments[0] == "cpt" else []))
        assert line == (
            f"moetool: {out} holds an unfinished run of moetool cpt; repeat its command to finish it, or give a step"
            f" folder ({out}/checkpoints)"
        )
    done = max(int(folder.name[5:]) for folder in (out / "checkpoints").glob("step-??????"))
    assert 6 <= done < 4000
    assert "--max-steps (4000 before" in refused(llama, out, jsonl, *options, steps=done + 1)
    # As long as it would have been, had it not been begun shorter.
    folder = out / "checkpoints" / f"step-{done:06d}"
    trained(llama, long, jsonl, *options, "--keep-checkpoints", 1, steps=done)
    assert (folder / "model.safetensors").read_bytes() == (long / "model.safetensors").read_bytes()
    assert (out / "notes.txt").read_text() == "the user's own"


def test_a_run_killed_where_it_takes_its_result_back(
    tmp_path: Path, llama: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--schedule", "constant", "--warmup-steps", 1, "--val-fraction", 0]
    out, long = tmp_path / "out", tmp_path / "long"
    trained(llama, out, jsonl, *options, steps=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moetool.train.state.withdraw", killed)
        assert tiny.in_process(*command(llama, out, jsonl, *options, steps=2))[0] == 130
    assert (out / "summary.json").exists()
    assert (out / "moetool.partial.json").exists()
    # Its own command makes it the result that it was, a longer one goes on.
    shutil.copytree(out, tmp_path / "back")
    assert trained(llama, tmp_path / "back", jsonl, *options, steps=1)["steps"] == 1
    assert (tmp_path / "back" / "config.json").exists()
    trained(llama, out, jsonl, *options, steps=2)
    trained(llama, long, jsonl, *options, steps=2)
    same(out, long, 2)


def test_weights_by_phase(tmp_path: Path, llama: Path, jsonl: Path) -> None:
    old = tiny.save_jsonl(tmp_path / "old.jsonl", ["Old text, seen before."])
    options = ["--train", f"more={old}", "--schedule", "constant", "--warmup-steps", 1, "--val-fraction", 0]
    options += ["--keep-checkpoints", 9]
    out, long, grown = (tmp_path / name for name in ("out", "long", "grown"))
    code, stdout, stderr = tiny.in_process(*command(llama, out, jsonl, *options, "--weight", "new=1@0,3@50%", steps=4))
    assert code == 0, stderr
    assert "weight 1@0,3@2" in " ".join(stdout.split())
    # 4 sequences a step: 2 steps with half of them, then 2 with three quarters.
    ledger = json.loads((out / "summary.json").read_text())["ledger"]
    assert {name: entry["tokens"] // 16 for name, entry in ledger.items()} == {"new": 10, "more": 6}
    # The change stays at step 2 of a longer run, and a further one may be added behind what is done.
    trained(llama, out, jsonl, *options, "--weight", "new=1@0,3@50%,0@5", steps=6)
    trained(llama, long, jsonl, *options, "--weight", "new=1@0,3@2,0@5", steps=6)
    same(out, long, 6)
    ledger = json.loads((out / "summary.json").read_text())["ledger"]
    assert {name: entry["tokens"] // 16 for name, entry in ledger.items()} == {"new": 13, "more": 11}
    assert "other options: --weight (new=1@0,3@2,0@5 more=1 before, new=1@0,3@3 more=1 now)" in refused(
        llama, out, jsonl, *options, "--weight", "new=1@0,3@3", steps=7
    )
    config = tmp_path / "c.yaml"
    config.write_text('weight: {new: "1@0,3@2"}\nmax-steps: 4\n')
    arguments = ["--config", config, "--train", f"new={jsonl}", *SMALL, *options]
    assert tiny.in_process("cpt", llama, grown, *arguments)[0] == 0
    assert all(
        torch.equal(value, load_file(out / "checkpoints" / "step-000004" / "model.safetensors")[name])
        for name, value in load_file(grown / "model.safetensors").items()
    )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("new=0.6@50%", "--weight new=0.6@50%: the first phase must begin at 0, such as 1@0,0.6@50%"),
        ("new=1@0,2", "--weight new=1@0,2: '2' is not a phase; write WEIGHT@START"),
        ("new=1@0,2@half", "'2@half' is not a phase"),
        ("new=1@0,2@120%", "'2@120%' is not a phase"),
        ("new=1@0,-2@3", "'-2@3' is not a phase"),
        ("new=0@0,0@3", "the weight is 0 in all phases"),
    ],
)
def test_phases_that_are_none_are_a_mistake_of_usage(
    tmp_path: Path, llama: Path, jsonl: Path, weight: str, message: str
) -> None:
    more = ["--train", f"more={jsonl}", "--weight", weight]
    code, _, stderr = tiny.in_process(*command(llama, tmp_path / "out", jsonl, *more, steps=4))
    assert code == 2
    assert message in " ".join(stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weight", "new=1@0,2@4"], "--weight new=1@0,2@4: a run of 4 steps does not reach @4"),
        (["--weight", "new=1@0,2@3,3@50%"], "--weight new=1@0,2@3,3@50%: @50% (step 2) is not after @3; give starts"),
        (["--weight", "new=1@0,0@2", "--weight", "more=0@0,1@3"], "all weights of new and more are 0 from step 2 on"),
    ],
)
def test_phases_must_fit_the_run(tmp_path: Path, llama: Path, jsonl: Path, options: list[object], message: str) -> None:
    more = tiny.save_jsonl(tmp_path / "more.jsonl", ["More."], repeat=40)
    assert message in tiny.refusal(
        *command(llama, tmp_path / "out", jsonl, "--train", f"more={more}", *options, steps=4)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decay-shape", "linear"], "--decay-shape has no effect with --schedule cosine"),
        (
            ["--schedule", "wsd", "--constant-end", 1, "--decay-shape", "linear"],
            "--decay-shape has no effect with --constant-end 1",
        ),
        (["--shares-of", 9, "--warmup-steps", 1], "--shares-of has no effect"),
    ],
)
def test_options_without_effect(tmp_path: Path, llama: Path, jsonl: Path, options: list[object], message: str) -> None:
    code, _, stderr = tiny.in_process(*command(llama, tmp_path / "out", jsonl, *options, steps=4))
    assert code == 2
    assert message in " ".join(stderr.split())


def test_every_schedule_takes_its_own_shape() -> None:
    assert {name: schedules.default_shape(name) for name in ("cosine", "constant", "wsd", "infinite")} == {
        "cosine": None, "constant": None, "wsd": "linear", "infinite": "exponential",
    }  # fmt: skip
