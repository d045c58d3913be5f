"""docs/recipes.md: its figures are what the tool says of the published sizes, its commands run in small."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from moetool.cost.memory import Training, estimate
from moetool.cost.parameters import sizes_of
from tests import recipes, tiny
from tests.integration.test_docs import commands

GPU = 80e9
GPUS = (1, 2, 4, 8, 16, 32)
# Appended to the page's commands: the last one counts.
SMALL: dict[str, list[str]] = {
    "plan": [],
    "upcycle": ["--dtype", "float32"],
    "cpt": [
        *("--max-tokens", "512", "--seq-len", "64", "--global-batch-size", "4", "--micro-batch-size", "2"),
        *("--precision", "fp32"),
    ],
    "analyze-routing": ["--max-tokens", "200", "--seq-len", "64"],
    "eval": ["--limit", "2"],
}


@contextmanager
def skeleton(name: str, target: str) -> Iterator[Any]:
    """The Mixture of Experts of a recipe without its weights, and its plan."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from moetool.checkpoint.reader import CheckpointReader
    from moetool.recipe import UpcycleRecipe
    from moetool.upcycle.plan import plan_upcycling

    with CheckpointReader(Path(name)) as reader:
        recipe = UpcycleRecipe(
            target=target, num_experts=8, top_k=2, method="drop", drop_ratio=Decimal("0.5"), seed=0, dtype="BF16"
        )
        config = dict(plan_upcycling([reader], recipe, 5 * 10**9).plan.config)
    with torch.device("meta"):
        yield AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))


def figures(name: str, place: Path) -> dict[str, str]:
    """The row of a model, from the page's own `--plan` command and the estimate of cpt; in the working folder."""
    from moetool.cost.memory import loading_bytes
    from moetool.cost.operations import flops_per_token
    from moetool.mesh import Mesh, check_model

    folder = recipes.save_headers(name, place / name)
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) < 2e6  # holes take no disk
    plans = [line for line in commands(recipes.PAGE) if f" {name} " in line and "--plan" in line]
    command = next(line for line in plans if "-moe " in line)
    code, out, err = tiny.in_process(*shlex.split(command)[1:], "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["peak_memory_bytes"] < 0.5e9, plan["workers"]
    total = plan["parameters"]["total"]
    training = Training(4096, micro_batch_size=1, precision="bf16", gradient_checkpointing=True, compiled_loss=True)
    with skeleton(name, plan["target"]) as model:
        sizes = sizes_of(model)
        assert sizes.count() == (total, plan["parameters"]["active"])
        meshes = {n: Mesh(fsdp=min(n, 8), tp=-(-n // 8)) for n in GPUS}  # FSDP divides 8 experts no further
        each = {n: estimate(sizes, training, mesh)["total"] for n, mesh in meshes.items()}
        gpus = next(n for n in GPUS if each[n] < 0.9 * GPU)
        check_model(meshes[gpus], model)
        host = loading_bytes(sizes, meshes[gpus], gpu=True) * min(8, gpus)
        operations = flops_per_token(sizes, 4096)
    billions = {what: f"{number / 1e9:.2f} B" for what, number in plan["parameters"].items()}
    return {
        "model": name.split("/")[1],
        "target": f"`{plan['target']}`",
        **billions,
        "checkpoint, GB": f"{plan['num_bytes'] / 1e9:.1f}",
        "step folder, GB": f"{14 * total / 1e9:.0f}",
        "upcycling, s": f"{7.04 * plan['num_bytes'] / 5.11e9:.0f}",
        "GPUs": str(gpus),
        "GB per GPU": f"{each[gpus] / 1e9:.0f}",
        "host, GB": f"{host / 1e9:.0f}",
        "GPU-hours": f"{operations * 1e9 / (0.3 * 989e12) / 3600:.0f}",
    }


@pytest.mark.parametrize("name", recipes.CONFIGS)
def test_the_figures_of_a_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = (row for row in recipes.table() if row["model"] == name.split("/")[1])
    assert row == figures(name, tmp_path)


def test_the_memory_of_one_gpu(tmp_path: Path) -> None:
    name = "meta-llama/Llama-3.2-1B"
    folder = recipes.save_headers(name, tmp_path / "llama")
    training = Training(4096, micro_batch_size=1, precision="bf16", gradient_checkpointing=True, compiled_loss=True)
    with skeleton(str(folder), "mixtral") as model:
        default, small, offload = (
            estimate(sizes_of(model), replace(training, **options))
            for options in ({}, {"moments": "8bit", "master_weights": False}, {"moments": "offload"})
        )
    gb = [round(size / 1e9) for size in (small["total"], default["total"], offload["total"], offload["host"])]
    text = " ".join(recipes.PAGE.read_text(encoding="utf-8").split())
    assert (
        "is {} GB instead of {}. With `--moments offload`, which is exact but slower, it is {} GB, and {} GB".format(
            *gb
        )
        in text
    )


def test_the_table_has_every_model() -> None:
    assert [row["model"] for row in recipes.table()] == [name.split("/")[1] for name in recipes.CONFIGS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of the same families under the same names, and text."""
    root = tmp_path_factory.mktemp("recipes")
    (root / "data").mkdir()
    for name, config in (recipes.CONFIGS | recipes.LARGE).items():
        changes = {key: config[key] for key in ("tie_word_embeddings", "use_sliding_window") if key in config}
        tiny.save_tokenizer(tiny.save_dense(config["model_type"], root / name, **changes))
    for name in ("code", "prose"):
        tiny.save_jsonl(root / "data" / f"{name}.jsonl", repeat=30)
    return root


def test_the_commands_of_the_page_run_in_small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ran = set()
    for line in commands(recipes.PAGE):
        words = shlex.split(line)
        if words[0] == "torchrun":  # the launch itself is for GPUs, and here there is one process
            words = words[words.index("-m") + 1 :]
            del words[words.index("--fsdp") : words.index("--fsdp") + 2]
        if "--moments" in words:  # for bf16, and for torchao, which is optional
            del words[words.index("--moments") : words.index("--moments") + 3]
        assert words[0] == "moetool"
        code, _, err = tiny.in_process(*words[1:], *SMALL[words[1]])
        assert code == 0, f"{line}\n{err}"
        ran.add(words[1])
    assert ran == set(SMALL)
