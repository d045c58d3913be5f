"""What goes wrong says what was found and what to do, in one line, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny


def fails(*arguments: object, code: int = 1) -> str:
    got, out, err = tiny.in_process(*arguments)
    assert got == code, err
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    return err


def test_wrong_paths(tmp_path: Path, llama: Path) -> None:
    assert "no folder" in fails("upcycle", tmp_path / "nowhere", tmp_path / "moe")
    assert "is a file" in fails("upcycle", llama / "config.json", tmp_path / "moe")
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in fails("upcycle", tmp_path / "empty", tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    message = fails("upcycle", "someone/some-model", tmp_path / "moe")
    assert "someone/some-model" in message
    assert "network" in message


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "half"])
def test_a_ratio_outside_0_to_1_is_a_usage_error(llama: Path, tmp_path: Path, value: str) -> None:
    assert value in fails("upcycle", llama, tmp_path / "moe", f"--drop-ratio={value}", code=2)
    assert not (tmp_path / "moe").exists()


def test_options_that_contradict_each_other(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert "no effect" in fails("upcycle", llama, out, "--method", "copy", "--drop-ratio", "0.5", code=2)
    assert "more than" in fails("upcycle", llama, out, "--top-k", "9", code=2)
    assert "did you mean 'drop'" in fails("upcycle", llama, out, "--method", "drp", code=2)
    assert "No such option" in fails("upcycle", llama, out, "--ratio", "1", code=2)
    assert not out.exists()


def test_unsupported_sources_are_refused_with_the_reason(mixtral: Path, llama: Path, tmp_path: Path) -> None:
    assert "is already a Mixture of Experts" in fails("upcycle", mixtral, tmp_path / "moe")
    for change, reason in [
        ({"model_type": "gpt2"}, "cannot be upcycled, because its FFN has no gate"),
        ({"model_type": "never"}, "not a family that can be upcycled; the dense families are llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": 48}, "config.json says"),
        ({"num_hidden_layers": 3}, "is missing"),
        ({"num_hidden_layers": 1}, "does not belong"),
        ({"intermediate_size": "64"}, "positive whole number"),
    ]:
        folder = Path(shutil.copytree(llama, tmp_path / "m", dirs_exist_ok=True))
        config = json.loads((llama / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        assert reason in " ".join(fails("upcycle", folder, tmp_path / "moe").split())
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    dense = tiny.save_llama(tmp_path / "dense", dtype=torch.bfloat16)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in fails("upcycle", dense, tmp_path / "moe")
    assert list((tmp_path / "moe").glob("*")) == []


def test_out_is_never_the_source_nor_inside_it(llama: Path, tmp_path: Path) -> None:
    assert "never modified" in fails("upcycle", llama, llama)
    assert "never modified" in fails("upcycle", llama, llama / "moe")
    (tmp_path / "link").symlink_to(llama)
    assert "never modified" in fails("upcycle", llama, tmp_path / "link" / "moe")


def test_a_folder_with_other_things_is_left_alone(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "not empty" in fails("upcycle", llama, out)
    assert "notes.txt" in fails("upcycle", llama, out, "--overwrite")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("")
    assert "is a file" in fails("upcycle", llama, tmp_path / "file")


def test_a_finished_folder_is_proved_again_and_another_recipe_refused(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out, "--quiet") == (0, "", "")
    code, text, _ = tiny.in_process("upcycle", llama, out)
    assert code == 0
    assert "already finished" in text
    assert "is a different finished checkpoint" in fails("upcycle", llama, out, "--seed", "1")
    assert tiny.in_process("upcycle", llama, out, "--seed", "1", "--overwrite")[0] == 0
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert "failed verification" in fails("upcycle", llama, out, "--seed", "1")


def test_verify_finds_a_changed_entry(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    tiny.in_process("upcycle", llama, out)
    assert tiny.in_process("verify", out)[0] == 0
    path = out / "model.safetensors"
    whole = path.read_bytes()
    tensors = load_file(path)
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    for value in (0.0, 100.0):  # kept or redrawn: an entry is changed either way
        tensors = load_file(path)
        tensors[name][7, 9] = value
        save_file(tensors, path, metadata={"format": "pt"})
        assert "model.safetensors" in fails("verify", out)
        path.write_bytes(whole)
    assert tiny.in_process("verify", out)[0] == 0
    path.write_bytes(whole[:-4])
    assert "damaged" in fails("verify", out)
    assert "only folders with one" in fails("verify", llama)


def test_verify_asks_where_the_source_went(llama: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(llama, tmp_path / "dense"))
    tiny.in_process("upcycle", dense, tmp_path / "moe")
    dense.rename(tmp_path / "moved")
    assert "--source" in fails("verify", tmp_path / "moe")
    assert tiny.in_process("verify", tmp_path / "moe", "--source", tmp_path / "moved")[0] == 0
    other = tiny.save_llama(tmp_path / "other", seed=1)
    assert "not the file that was upcycled" in fails("verify", tmp_path / "moe", "--source", other)


def test_a_folder_that_cannot_be_written(llama: Path, tmp_path: Path) -> None:
    # Root may write anywhere; a file system that refuses is stood in for by /proc, where mkdir fails.
    message = fails("upcycle", llama, "/proc/moe")
    assert "/proc/moe" in message


def test_a_full_disk_is_said_before_anything_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetool.surgery.apply.free_disk", lambda folder: 1000)
    message = fails("upcycle", llama, tmp_path / "moe")
    assert "1.0 kB free" in message
    assert list((tmp_path / "moe").glob("*")) == []


def test_a_disk_that_fills_up_leaves_no_loadable_half(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    real, calls = os.pwrite, 0

    def pwrite(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "pwrite", pwrite)
    message = fails("upcycle", llama, tmp_path / "moe", "--max-shard-size", "60KB")
    assert "no space left on device; free some space" in message
    left = {p.name for p in (tmp_path / "moe").iterdir()}
    assert "config.json" not in left
    assert not any(name.endswith(".unfinished") for name in left)
    monkeypatch.undo()
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--max-shard-size", "60KB")[0] == 0


def test_a_complete_shard_that_changed_before_the_resume_is_found(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from moetool.checkpoint.writer import CheckpointWriter

    out, common = tmp_path / "moe", ("--max-shard-size", "60KB", "--workers", "1")
    assert tiny.in_process("upcycle", llama, tmp_path / "whole", *common)[0] == 0
    real, closed = CheckpointWriter.close, 0

    def close(self: CheckpointWriter, *arguments: object) -> None:
        nonlocal closed
        closed += 1
        if closed > 3:
            raise OSError(errno.EIO, "Input/output error", str(out))
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "close", close)
    assert "input/output error" in fails("upcycle", llama, out, *common)
    monkeypatch.undo()
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert f"{shard.name} has changed" in fails("upcycle", llama, out, *common)
    shard.unlink()
    assert tiny.in_process("upcycle", llama, out, *common)[0] == 0
    for file in sorted(out.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    assert (out / "moetool.json").read_bytes() == (tmp_path / "whole" / "moetool.json").read_bytes()


@pytest.mark.slow
def test_a_real_full_disk_and_a_read_only_one(llama: Path, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)], check=False)
    if made.returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        assert "free" in fails("upcycle", llama, mount / "moe")
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        assert "read-only" in fails("upcycle", llama, mount / "other")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moetool", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> float:
    """Wait until a path exists or the process has ended; return the time."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)
    return time.perf_counter()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_it_cannot_be_loaded_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    import random

    from moetool.checkpoint.reader import CheckpointReader
    from moetool.errors import CheckpointError

    dense = tiny.save_llama(tmp_path / "dense", hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    donor = tiny.save_llama(tmp_path / "donor", 1, hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    common = ["--max-shard-size", "10MB", "--verify", "none"]
    recipes: list[list[object]] = [
        [],
        ["--target", "granitemoe", "--drop-index", "per-matrix"],
        ["--target", "glm4_moe", "--granularity", 4, "--num-experts", 12, "--top-k", 3, "--donor", donor],
        ["--target", "qwen2_moe", "--method", "scratch"],
    ]
    chance, unfinished, whole = random.Random(0), 0, {}
    for number, recipe in enumerate(recipes):
        process = start("upcycle", dense, tmp_path / f"whole{number}", *recipe, *common)
        began = wait_for(tmp_path / f"whole{number}", process)
        assert process.wait() == 0
        files = {p.name: p.read_bytes() for p in (tmp_path / f"whole{number}").glob("*.safetensors")}
        whole[number] = (time.perf_counter() - began, files)
    for trial in range(52):
        out, number = tmp_path / f"out{trial}", trial % len(recipes)
        lasts, expected = whole[number]
        process = start("upcycle", dense, out, *recipes[number], *common)
        wait_for(out, process)
        time.sleep(chance.uniform(0, lasts))
        process.kill()
        process.communicate()
        if not (out / "config.json").exists() or (out / "moetool.partial.json").exists():
            unfinished += 1
            with pytest.raises(CheckpointError):
                CheckpointReader(out)
        if (out / "moetool.partial.json").exists() and trial % 4 == 0:
            other = tiny.cli("upcycle", dense, out, *recipes[number], *common, "--seed", "7")
            assert other.returncode == 1
            assert "seed 0 -> 7" in other.stderr
        finished = tiny.cli("upcycle", dense, out, *recipes[number], *common)
        assert finished.returncode == 0, finished.stderr
        assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == expected
        shutil.rmtree(out)
    assert unfinished >= 20


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_have_their_exit_codes(tmp_path: Path, sign: signal.Signals, code: int) -> None:
    dense = tiny.save_llama(tmp_path / "dense", hidden_size=512, intermediate_size=4096, num_hidden_layers=8)
    out = tmp_path / "moe"
    process = start("upcycle", dense, out)
    wait_for(out / "moetool.partial.json", process)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(err.strip().splitlines()) == 1
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.unfinished"))


def change_config(source: Path, folder: Path, change: dict[str, object]) -> Path:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


HOSTILE: list[dict[str, object]] = [
    {"model_type": ["llama"]},
    {"num_hidden_layers": 10**12},
    {"num_key_value_heads": {"a": 1}},
    {"num_key_value_heads": 2.0},
    {"head_dim": {"a": 1}},
    {"head_dim": 0},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": float("inf")},
    {"hidden_act": ["silu"]},
    {"tie_word_embeddings": "false"},
    {"max_position_embeddings": -1},
    {"rope_parameters": None, "rope_theta": -1},
    {"rope_parameters": {"rope_theta": "x"}},
]


@pytest.mark.parametrize("change", HOSTILE, ids=str)
def test_a_config_that_makes_no_sense_is_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = change_config(llama, tmp_path / "m", change)
    fails("upcycle", folder, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_what_config_json_says_besides_is_kept_as_it_is_meant(llama: Path, tmp_path: Path) -> None:
    # Llama reads no sliding window, Mixtral would; null means none; no quantisation is none.
    change: dict[str, object] = {"sliding_window": 8, "bos_token_id": None, "quantization_config": None}
    folder = change_config(llama, tmp_path / "m", change)
    assert tiny.in_process("upcycle", folder, tmp_path / "moe")[0] == 0
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["sliding_window"] is None
    assert config["bos_token_id"] is None


def test_a_finished_folder_of_another_source_or_other_files_is_not_taken_for_it(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out)[0] == 0
    other = tiny.save_llama(tmp_path / "other", seed=1)
    assert "is a different finished checkpoint" in fails("upcycle", other, out, "--verify", "none")
    assert "is a different finished checkpoint" in fails("upcycle", llama, out, "--max-shard-size", "40KB")
    assert tiny.in_process("upcycle", llama, out, "--verify", "none")[0] == 0


def test_shards_that_another_run_finishes_meanwhile_are_never_taken_over(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two recipes that differ by the seed have equal headers: only the lock keeps their shards apart.
    from moetool.checkpoint import writer

    real = writer.prepare

    def slow(folder: Path, *arguments: object) -> None:
        real(folder, *arguments)  # type: ignore[arg-type]
        done = tiny.cli("upcycle", llama, folder, "--seed", "7")
        assert done.returncode == 1
        assert "another process" in done.stderr

    monkeypatch.setattr("moetool.surgery.apply.prepare", slow)
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--verify", "full")[0] == 0
    assert json.loads((tmp_path / "moe" / "moetool.json").read_text())["lineage"][0]["recipe"]["seed"] == 0


def test_values_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, llama: Path) -> None:
    dense = tiny.save_llama(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    assert "float16 cannot" in fails("upcycle", dense, tmp_path / "moe", "--dtype", "float16", "--verify", "none")
    assert "router std" in fails("upcycle", llama, tmp_path / "moe", "--router-std", "1e999", "--verify", "none")


def test_a_loop_of_links_is_one_line(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "loop" in fails("upcycle", llama, tmp_path / "loop")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("recipe", {"target": "mixtral"}),
        ("recipe", []),
        ("num_experts", "8"),
        ("max_shard_size", "much"),
        ("source", "there"),
        ("sha256", []),
        ("redrawn_units", None),
        ("digests", []),
    ],
)
def test_verify_of_a_damaged_lineage_is_one_line(llama: Path, tmp_path: Path, part: str, value: object) -> None:
    out = tmp_path / "moe"
    tiny.in_process("upcycle", llama, out)
    document = json.loads((out / "moetool.json").read_text())
    entry = document["lineage"][0]
    holder = {"num_experts": entry["recipe"], "sha256": entry["source"], "digests": entry["redrawn_units"]}
    holder.get(part, entry)[part] = value
    if value is None:
        del entry[part]
    (out / "moetool.json").write_text(json.dumps(document))
    fails("verify", out)


def test_every_shard_is_on_disk_before_it_gets_its_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    out = tmp_path / "moe"
    assert tiny.in_process("upcycle", llama, out, "--max-shard-size", "100KB")[0] == 0
    names = [p.name for p in out.glob("model*")] + ["config.json", "moetool.json"]
    assert len(names) > 5
    for name in names:
        place = events.index(("rename", name))
        assert ("fsync", f"{name}.unfinished") in events[:place]
        assert ("fsync", "moe") in events[place:], "the rename itself is made durable"


def test_a_donor_that_is_dense_itself_is_told(llama: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(llama)
    for more in (["--plan"], []):
        code, _, err = tiny.in_process("upcycle", llama, tmp_path / "moe", "--donor", link, *more)
        assert code == 0
        assert f"--donor {link} is DENSE itself" in err


def test_a_plan_warns_of_what_the_run_warns_of(mixtral: Path, tmp_path: Path) -> None:
    other = shutil.copytree(mixtral, tmp_path / "other")
    for command, words in (
        (("average", tmp_path / "mean", mixtral, other), "no moetool.json says that these checkpoints come from one"),
        (
            ("convert", mixtral, tmp_path / "fused", "--layout", "fused"),
            "other programs may need one tensor per expert",
        ),
    ):
        for more in (["--plan"], []):
            code, _, err = tiny.in_process(*command, *more)
            assert code == 0, err
            assert words in err, more


@pytest.mark.parametrize("command", ["upcycle a b --dtype", "cpt a b --save-dtype", "eval a --dtype"])
def test_short_names_of_dtypes_work_and_errors_are_not_pydantics(command: str) -> None:
    code, _, err = tiny.in_process(*command.split(), "int4")
    assert code == 2
    assert err.startswith("moetool: Invalid value for '--")
    assert "'int4' is not one of 'auto', 'float32', 'bfloat16', 'float16', 'fp32', 'bf16', 'fp16' (see" in err
    for short in ("fp32", "bf16", "fp16"):
        assert short not in tiny.in_process(*command.split(), short)[2]


def test_a_short_name_of_a_dtype_is_recorded_in_full(llama: Path, tmp_path: Path) -> None:
    assert tiny.in_process("upcycle", llama, tmp_path / "moe", "--dtype", "bf16")[0] == 0
    assert "dtype: bfloat16\n" in (tmp_path / "moe" / "moetool.yaml").read_text()
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_size_without_its_unit_is_refused(llama: Path, tmp_path: Path) -> None:
    code, _, err = tiny.in_process("upcycle", llama, tmp_path / "moe", "--max-shard-size", "5")
    assert code == 2
    assert "'5' means 5 bytes; if 5 GB were meant, write 5GB" in err
