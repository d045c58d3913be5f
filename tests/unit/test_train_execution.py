"""How a run is computed: what cannot be is said in one line, and nothing is left behind."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moetool.errors import ConfigError
from moetool.train.config import TrainConfig
from moetool.train.execution import check_execution, executing

CPU = torch.device("cpu")


def config(**how: Any) -> TrainConfig:
    return TrainConfig(Path("model"), Path("out"), {}, **how)


def test_a_model_without_gradient_checkpointing_is_refused() -> None:
    model = SimpleNamespace(supports_gradient_checkpointing=False)
    check_execution(config(), model, CPU)
    with pytest.raises(ConfigError, match="--gradient-checkpointing: transformers has none for SimpleNamespace"):
        check_execution(config(gradient_checkpointing=True), model, CPU)


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
