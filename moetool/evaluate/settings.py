"""How checkpoints are scored, as options of `moetool eval`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from moetool.errors import ConfigError
from moetool.mesh import check_shared, ep_option, fsdp_option, mesh_of, tp_option
from moetool.option import check_device, device_map_option, device_option, dtype_option, option


def _batch_size(text: str) -> str:
    number = text.removeprefix("auto:") if text.startswith("auto:") else text
    if text != "auto" and not (number.isdigit() and int(number) > 0):
        raise ConfigError(f"'{text}': give a number, auto, or auto:N")
    return text


def _limit(value: float) -> float:
    if value <= 0 or (value > 1 and value != int(value)) or not math.isfinite(value):
        raise ConfigError(f"{value:g}: give a number of documents, or a share below 1")
    return value


@dataclass(frozen=True)
class Settings:
    """How the models are run."""

    limit: float | None = option(
        "Number of documents per task, or a share below 1.",
        None,
        metavar="N",
        typed=float,
        parse=_limit,
        after="num_fewshot",
    )
    batch_size: str = option(
        "Batch size: a number, auto, or auto:N.", "1", metavar="N", parse=_batch_size, after="limit"
    )
    routing: bool = option(
        "Count routes during each task, and report mri and load beside the score.",
        False,
        flag="--routing",
        after="baseline",
    )
    log_samples: bool = option(
        "Write the prompt and answer of each document to --out.", False, flag="--log-samples", after="offline"
    )
    allow_code_execution: bool = option(
        "Run model-generated code, for tasks that need it.",
        False, flag="--allow-code-execution", recorded=False, after="log_samples",
    )  # fmt: skip
    device: str = device_option(after="document")
    dtype: str = dtype_option("Dtype of the weights in memory; auto keeps the saved one.", after="device")
    device_map: str | None = device_map_option(after="dtype")
    fsdp: int = fsdp_option()
    ep: int = ep_option()
    tp: int = tp_option()

    def check(self, typed: Collection[str]) -> None:
        """Raise ConfigError if options contradict each other."""
        check_device(self)
        check_shared(self)
        if self.allow_code_execution and not mesh_of(self).whole:
            raise ConfigError("--allow-code-execution: processes that share a model would each run all code; use one")
        if self.batch_size.startswith("auto") and not mesh_of(self).whole:
            raise ConfigError("--batch-size auto: processes that share a model need the same number; give one")
