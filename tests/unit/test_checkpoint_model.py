"""Loading through transformers: nothing goes missing in silence, and any expert size runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetool.checkpoint.hub import resolve_model
from moetool.checkpoint.model import load_model, load_tokenizer
from moetool.errors import CheckpointError, DataError
from tests import tiny


@pytest.mark.parametrize("name", ["model.layers.1.block_sparse_moe.gate.weight", "lm_head.weight"])
def test_a_missing_tensor_is_refused_where_transformers_would_invent_it(
    mixtral: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(mixtral, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing tensors"):
        load_model(folder)


def test_a_tensor_too_many_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensors model\.layers\.0\.extra\.weight"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_sizes_that_the_grouped_kernel_refuses_still_run(tmp_path: Path, dtype: str) -> None:
    folder = tiny.save_mixtral(
        tmp_path / "odd",
        hidden_size=36,
        intermediate_size=61,
        num_attention_heads=3,
        head_dim=12,
        num_key_value_heads=1,
    )
    model = load_model(folder, dtype)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_a_model_without_tokenizer_says_so(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(mixtral).eos_token_id == 0


def test_a_name_of_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="someone/a-model here, and the hub did not provide it"):
        resolve_model("someone/a-model")
    (tmp_path / "someone" / "a-model").mkdir(parents=True)
    assert resolve_model("someone/a-model") == Path("someone/a-model")
    for name in ("nowhere", "./some/where", "a/b/c", "/abs/olute"):
        with pytest.raises(CheckpointError, match="no folder"):
            resolve_model(name)
