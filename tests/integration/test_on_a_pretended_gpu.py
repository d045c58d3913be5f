"""Everything that runs on a GPU, on one that is pretended: each tensor in its place, and one wait a training step."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moetool.train import state
from moetool.train.loop import Run
from tests import tiny
from tests.pretended_gpu import Pretended, pretended_gpu

FEW = 16  # numbers that may be copied to the device from any memory: one for each expert of each layer
# What a run's options change in a step.
WAYS = {
    "qwen3_moe": [
        "--gradient-checkpointing --no-cross-document",
        "--balance global-aux --balance seq-aux --balance z-loss --router-gradient default",
        "--precision fp32 --deterministic",
    ],
    "mixtral": [
        "--balance pooled-aux --balance adaptive-aux --router-gradient dense --experts-implementation grouped_mm",
        "--balance sinkhorn --balance erc --teacher TEACHER --teacher-on all",
        "--replay again=TEXT --teacher TEACHER",
    ],
    "glm4_moe": ["--balance loss-free --balance aux --train-only routers", "--freeze-router --grad-clip 0"],
    "llama": ["--weight-decay 0"],
}
MOMENTS = ["--moments fp32", "--moments bf16", "--moments 8bit --no-master-weights", "--moments offload"]


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao, where `make` puts it; it is imported as on any machine."""
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "optional"))
    pytest.importorskip("torchao.optim", reason="make puts torchao into .venv/optional")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 300}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 128}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **ends, initializer_range=0.2)).save_pretrained(folder / "qwen3_moe")
    tiny.save_tokenizer(folder / "qwen3_moe")
    tiny.save_mixtral(folder / "mixtral")
    tiny.save_glm4_moe(folder / "glm4_moe")
    tiny.save_llama(folder / "llama")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    # torchao's updates are compiled, which needs a real GPU.
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    with pretended_gpu() as gpu:
        yield gpu


def cpt(model: Path, out: Path, text: Path, *more: object) -> None:
    sizes = ["--seq-len", 16, "--global-batch-size", 4, "--micro-batch-size", 2, "--max-steps", 2, "--save-every", 1]
    others = ["--val-fraction", 0, "--lr", 1e-3, "--no-compile", "--quiet"]
    code, _, stderr = tiny.in_process("cpt", model, out, "--train", f"new={text}", *sizes, *others, *more)
    assert code == 0, stderr


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


@pytest.fixture
def steps(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> list[Counter[str]]:
    """What the host waits for in each step, with what follows it."""
    found: list[Counter[str]] = []
    update, after = Run._update, Run._any

    def updated(run: Run) -> dict[str, Any]:
        before = gpu.counted()
        row = update(run)
        found.append(gpu.counted() - before)
        return row

    def asked(run: Run, *flags: bool) -> list[bool]:
        before = gpu.counted()
        answer = after(run, *flags)
        found[-1] += gpu.counted() - before
        return answer

    monkeypatch.setattr(Run, "_update", updated)
    monkeypatch.setattr(Run, "_any", asked)
    return found


@pytest.mark.parametrize(("family", "how"), [(family, how) for family, ways in WAYS.items() for how in ways])
def test_a_step_waits_once(
    family: str,
    how: str,
    models: dict[str, Path],
    jsonl: Path,
    tmp_path: Path,
    gpu: Pretended,
    steps: list[Counter[str]],
) -> None:
    options = how.replace("TEACHER", str(models["llama"])).replace("TEXT", str(jsonl)).split()
    cpt(models[family], tmp_path / "run", jsonl, *options, "--max-steps", 3, "--save-every", 3)
    assert len(steps) == 3
    for step in steps[1:]:
        assert list(step.values()) == [1], step
        assert next(iter(step)).startswith("a copy to the host: moetool/train/loop.py:")
    assert all(size <= FEW for _, size in gpu.pageable), gpu.pageable


@pytest.mark.parametrize("how", MOMENTS)
def test_a_saved_step_is_whole_and_a_run_goes_on_from_it(
    how: str, models: dict[str, Path], jsonl: Path, tmp_path: Path, torchao: None, gpu: Pretended
) -> None:
    out = tmp_path / "run"
    cpt(models["mixtral"], out, jsonl, *how.split())
    whole, first = contents(out), losses(out)
    # As after a kill between the two saves: the end is gone, and the mark of an unfinished run is back.
    shutil.rmtree(out / "checkpoints/step-000002")
    for name in ("config.json", "summary.json"):
        (out / name).unlink()
    state.claim(out)
    cpt(models["mixtral"], out, jsonl, *how.split())
    assert losses(out) == first
    assert contents(out) == whole


def test_the_result_is_that_of_the_processor(models: dict[str, Path], jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": " ".join(tiny.TEXT)}) + "\n")
    validated = ["--val", f"other={tmp_path / 'other.jsonl'}"]
    cpt(models["qwen3_moe"], tmp_path / "cpu", jsonl, "--precision", "bf16", *validated)
    with pretended_gpu() as gpu:
        cpt(models["qwen3_moe"], tmp_path / "gpu", jsonl, *validated)
    assert losses(tmp_path / "gpu") == losses(tmp_path / "cpu")
    assert not [line for line, size in gpu.pageable if size > FEW]
    assert contents(tmp_path / "gpu") == contents(tmp_path / "cpu")


PASSES = {
    "analyze-routing": "analyze-routing UPCYCLED --data a=TEXT --out OUT --compare UPCYCLED",
    "eval": "eval MIXTRAL --text a=TEXT --routing --limit 1 --out OUT",
    "sample": "sample MIXTRAL OUT.jsonl --max-tokens 40 --prompts a=TEXT --prompt-tokens 3",
    "prune": "prune MIXTRAL OUT --keep-experts 3 --data a=TEXT --merge ream --score reconstruction",
    "prune, layer by layer": "prune GLM OUT --keep-experts 2 --data a=TEXT --val a=TEXT --stream",
    "grow": "grow MIXTRAL OUT --num-experts 6 --start twins --utility gradient --data a=TEXT",
    "upcycle": "upcycle LLAMA OUT --num-experts 4 --target glm4_moe --donor LLAMA --router ridge --calibrate a=TEXT"
    " --calibrate b=OTHER",
    "upcycle, units": "upcycle LLAMA OUT --num-experts 8 --top-k 4 --granularity 2 --split activation"
    " --calibrate a=TEXT",
}


@pytest.mark.parametrize("command", PASSES.values(), ids=PASSES)
def test_a_pass_over_text_puts_tensors_in_their_places(
    command: str, models: dict[str, Path], jsonl: Path, tmp_path: Path, gpu: Pretended
) -> None:
    upcycled = tmp_path / "upcycled"
    if "UPCYCLED" in command:
        code, _, stderr = tiny.in_process("upcycle", models["llama"], upcycled, "--num-experts", 4, "--method", "drop")
        assert code == 0, stderr
    places = {"TEXT": jsonl, "OUT": tmp_path / "out", "UPCYCLED": upcycled, "MIXTRAL": models["mixtral"]}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "def add(a, b): return a + b; " * 20}) + "\n")
    places |= {"GLM": models["glm4_moe"], "LLAMA": models["llama"], "OTHER": other}
    for name, path in places.items():
        command = command.replace(name, str(path))
    length = [] if command.startswith(("eval", "sample")) else ["--seq-len", 16, "--max-tokens", 100]
    code, _, stderr = tiny.in_process(*command.split(), "--device", "cuda", "--quiet", *length)
    assert code == 0, stderr
    assert gpu.waits, "nothing ran on the GPU"


def test_the_pretended_gpu_refuses_what_a_real_one_does(gpu: Pretended) -> None:
    there, here = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    assert (there.device, there.to("cpu").device, (there * 2.0).device) == (
        torch.device("cuda:0"),
        torch.device("cpu"),
        torch.device("cuda:0"),
    )
    assert (there * torch.tensor(2.0)).is_cuda  # a number may be anywhere
    for wrong in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here.add_(there.sum()),
        lambda: there.scatter_add_(1, torch.zeros(2, 3, dtype=torch.int64), there),
        lambda: torch.rand(2, generator=torch.Generator(), device="cuda"),
    ):
        with pytest.raises(RuntimeError, match=r"same device|device type for generator"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    gpu.waits.clear()
    copy = torch.empty(2, 3, pin_memory=True).copy_(there, non_blocking=True)
    assert not gpu.waits
    with pytest.raises(RuntimeError, match="still on its way"):
        copy.sum()
    torch.cuda.synchronize()
    assert float(copy.sum()) == 6.0
    gpu.waits.clear()
    for waits, wait in enumerate(
        (
            lambda: there.sum().item(),
            lambda: there[there > 0],
            lambda: there.nonzero(),
            lambda: there.tolist(),
            lambda: there.cpu(),
            lambda: here.to("cuda"),
            lambda: torch.equal(there, there),
            lambda: torch.tensor([1], device="cuda"),
        ),
        start=1,
    ):
        wait()
        assert len(gpu.waits) == waits, gpu.waits
    here[:, 1:].pin_memory().to("cuda", non_blocking=True)
    here.pin_memory().to("cuda", non_blocking=True)
    here.to("cuda", non_blocking=True)
    assert [size for _, size in gpu.pageable] == [4, 6]  # of a part that is not one piece torch makes a copy first


def test_documents_are_counted_as_transformers_counts_them() -> None:
    from transformers import masking_utils

    from moetool.train import documents

    counted = masking_utils.find_packed_sequence_indices
    packed = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 0, 1, 2, 3]])
    single = torch.arange(6)[None].expand(2, -1)
    assert counted(packed).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]]
    for positions in (packed, single, None):
        asked = single if positions is None else positions
        with documents.told(positions):
            told = masking_utils.find_packed_sequence_indices(asked)
        expected = counted(asked)
        assert (told is None) == (expected is None)
        assert told is None or torch.equal(told, expected)
    assert masking_utils.find_packed_sequence_indices is counted
