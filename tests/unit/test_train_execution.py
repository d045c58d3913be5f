"""How a run is computed: what cannot be is said in one line, and nothing is left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moetool import registry
from moetool.checkpoint.model import load_model, skeleton
from moetool.errors import ConfigError
from moetool.train.config import TrainConfig
from moetool.train.execution import apply_execution, check_execution, executing
from tests.integration.test_grow import upcycled

CPU = torch.device("cpu")


def config(**how: Any) -> TrainConfig:
    return TrainConfig(Path("model"), Path("out"), {}, **how)


def test_a_model_without_gradient_checkpointing_is_refused() -> None:
    model = SimpleNamespace(supports_gradient_checkpointing=False)
    check_execution(config(), model, CPU)
    with pytest.raises(ConfigError, match="--gradient-checkpointing: transformers has none for SimpleNamespace"):
        check_execution(config(gradient_checkpointing=True), model, CPU)


def fake_liger(monkeypatch: pytest.MonkeyPatch, apply: Callable[..., None]) -> None:
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    vars(package)["_apply_liger_kernel_to_instance"] = apply
    vars(patches)["MODEL_TYPE_TO_APPLY_LIGER_FN"] = {"mixtral": None, "llama": None}
    root = ModuleType("liger_kernel")
    root.__spec__ = ModuleSpec("liger_kernel", None)
    for module in (root, package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_liger_kernel_is_applied_to_the_model(monkeypatch: pytest.MonkeyPatch, mixtral: Path, llama: Path) -> None:
    called: list[dict[str, Any]] = []
    fake_liger(monkeypatch, lambda **keywords: called.append(keywords))
    for folder in (mixtral, llama):
        model = load_model(folder, "float32")
        check_execution(config(liger=True), model, torch.device("cuda"))
        apply_execution(config(), model)
        assert not called
        apply_execution(config(liger=True), model)
        told = called.pop()
        assert told.pop("model") is model
        # The loss is the loop's own, and experts are left to transformers.
        assert told == {"cross_entropy": False, "fused_linear_cross_entropy": False, "swiglu": folder == llama}


@pytest.mark.parametrize(
    ("family", "dtype"), [("mixtral", "bfloat16"), *((family, "float32") for family in registry.names("target"))]
)
def test_functions_for_the_experts_are_compared_before_they_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, dtype: str
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = load_model(upcycled(family, tmp_path), dtype)
    for name in ("eager", "batched_mm", "grouped_mm"):
        apply_execution(config(experts_implementation=name), model)
        assert model.config._experts_implementation == name
    right = ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def without_a_gradient(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, right(self, hidden, index, weights.detach()) + 0 * weights.sum())

    def no_kernel(*_: Any) -> torch.Tensor:
        raise ImportError("no kernel\nfor this card")

    for wrong, told in ((without_a_gradient, "gradients of weights differ by 1.0e"), (no_kernel, "no kernel for this")):
        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "sonicmoe", wrong)
        with pytest.raises(ConfigError, match=told):
            apply_execution(config(experts_implementation="sonicmoe"), model)


def test_liger_kernel_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, mixtral: Path) -> None:
    model, asked = skeleton(mixtral), config(liger=True)
    with pytest.raises(ConfigError, match="--liger: liger-kernel's kernels need a GPU, but this run is on cpu"):
        check_execution(asked, model, CPU)
    monkeypatch.setattr("moetool.train.execution.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="run pip install liger-kernel"):
        check_execution(asked, model, torch.device("cuda"))
    monkeypatch.undo()

    def fail(**_: Any) -> None:
        raise AttributeError("'MixtralModel' object has no attribute 'layers'")

    fake_liger(monkeypatch, fail)
    model.config.model_type = "qwen2_moe"  # liger-kernel says nothing and does nothing
    with pytest.raises(ConfigError, match="no kernels for 'qwen2_moe'"):
        check_execution(asked, model, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"cannot change this model .AttributeError: 'MixtralModel' object has no"):
        apply_execution(asked, model)


def test_deterministic_kernels_last_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with executing(config(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with executing(config()):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_one_line() -> None:
    message = "put_ does not have a deterministic implementation,\nbut you set use_deterministic_algorithms"
    with (
        pytest.raises(ConfigError, match=r"--deterministic: put_ does not have.*; leave it out"),
        executing(config(deterministic=True)),
    ):
        raise RuntimeError(message)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="put_"), executing(config()):  # not asked for: a bug, with its traceback
        raise RuntimeError(message)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="something else"), executing(config(deterministic=True, compile=True)):
        raise ValueError("something else")
    assert not torch.are_deterministic_algorithms_enabled()
