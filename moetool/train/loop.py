"""The training loop: owns its batches, random generators and schedule.

accelerate (imported nowhere else) gives devices, processes and gathering. The model after N updates
is the model of step N.

Shapes: B sequences, S their length, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.nn import functional as F

from moetool import __version__
from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError, ConfigError
from moetool.progress import Progress, silent
from moetool.routing.capture import Route, RouterCapture, has_routers
from moetool.train import balance, schedules, state
from moetool.train.batches import IGNORED, Corpus, micro_batches, mix, validation_batches
from moetool.train.config import TrainConfig
from moetool.train.export import publish, save_checkpoint, source_dtype
from moetool.train.metrics import MetricsLog, summarize
from moetool.train.optimizer import adamw
from moetool.train.plan import describe


class Run:
    """A training run, ready to go on from `step`.

    Attributes:
        config: resolved.
        step: updates made.
        plan: what it is going to do, as plain values.
        warnings: what the user should know before it trains.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, corpus: Corpus, identity: dict[str, Any], step: int
    ) -> None:
        self.config, self.step = config, step
        self._accelerator, self._corpus, self._identity = accelerator, corpus, identity
        self._mixture = mix(corpus, config)
        self._schedule = schedules.build(config.schedule, config.max_steps, vars(config))
        self._dtype = source_dtype(config.model) if config.save_dtype == "auto" else config.save_dtype
        self._strategies = balance.build(config.balance)

        start = state.step_folder(config.out, step) if step else config.model
        try:
            self._core = _load(start, accelerator.device)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {state.ADVICE}" if step else str(error)) from None
        self._capture = RouterCapture(self._core) if has_routers(self._core) else None
        plan, self.warnings = describe(config, self._core, self._capture, self._mixture, corpus)
        where = {"device": str(accelerator.device), "num_processes": accelerator.num_processes}
        self.plan = {**plan, "step": step, "save_dtype": self._dtype, **where}
        optimizer = adamw(self._core, config)
        if step:
            state.load_training_state(start, self._core, optimizer)
        self._model, self._optimizer = accelerator.prepare(self._core, optimizer)
        self._raw_optimizer = optimizer

    def train(self, progress: Progress = silent) -> dict[str, Any]:
        """Train to the end, validating and saving on the way.

        Returns:
            The summary, which also lies in OUT/summary.json.

        Raises:
            ConfigError: the loss or the gradient is not finite; nothing of that step is saved.
        """
        config, out = self.config, self.config.out
        log = MetricsLog(out / state.METRICS, self.step) if self._accelerator.is_main_process else None
        if self.step == 0:
            self._validate(log, progress)
        while self.step < config.max_steps:
            row = self._update()
            if log:
                log.append(row)
            note = f"loss {row['loss']:.3f}  lr {row['lr']:.1e}  {row['tokens_per_second']:.0f} tok/s"
            progress("train", self.step, config.max_steps, note)
            last = self.step == config.max_steps
            if last or self.step % config.eval_every == 0:
                self._validate(log, progress)
            if last or self.step % config.save_every == 0:
                self._save()
        summary: dict[str, Any] = {}
        if log:
            summary = {**self._so_far(), **summarize(log, config.seq_len * config.global_batch_size)}
            publish(state.step_folder(out, self.step), out, {**summary, "identity": self._identity})
            state.release(out)
        self._accelerator.wait_for_everyone()
        return summary

    def _update(self) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics."""
        config, accelerator = self.config, self._accelerator
        began = time.perf_counter()
        world = accelerator.num_processes
        batch = micro_batches(self._mixture, config, self.step, accelerator.process_index, world)
        step_tokens, num_micro = config.seq_len * config.global_batch_size, len(batch) * world
        sums: Tensor | float = 0.0
        self._model.train()
        for micro in batch:
            torch.manual_seed(micro.seed)
            with nullcontext() if micro is batch[-1] else accelerator.no_sync(self._model):
                measured = self._forward_backward(micro.tokens, step_tokens, num_micro, world)
            sums = sums + measured
        norm = accelerator.clip_grad_norm_(self._model.parameters(), config.grad_clip or math.inf)
        # One reduction and one wait for the device a step.
        *values, grad_norm = torch.cat([accelerator.reduce(sums), norm.detach().reshape(1).to(sums)]).tolist()
        loss = values[0] / step_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise ConfigError(self._not_finite(loss, grad_norm))
        lr = self._schedule(self.step)
        for group in self._raw_optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1

        row = {"step": self.step, "loss": loss, "lr": lr, "grad_norm": grad_norm}
        row["balance"] = {name: values[1 + i] / num_micro for i, name in enumerate(self._strategies)}
        row["num_tokens"] = self.step * step_tokens
        row["tokens_per_second"] = step_tokens / (time.perf_counter() - began)
        if self._capture is not None:
            counts_LE = torch.tensor(values[1 + len(self._strategies) :], dtype=torch.float64).reshape(
                len(self._capture.layers), -1
            )
            row["mri"] = (counts_LE.amax(dim=-1) / step_tokens).tolist()
        return row

    def _forward_backward(self, tokens: Tensor, step_tokens: int, num_micro: int, world: int) -> Tensor:
        """Add one micro-batch's share of the step's gradient.

        Args:
            tokens: (B, S + 1).
            step_tokens: predicted tokens of the whole step.
            num_micro: micro-batches of the whole step.
            world: processes.

        Returns:
            Sums for the step's metrics: language loss over tokens, each strategy's loss, routes to
            each expert (L x E).
        """
        device = self._accelerator.device
        tokens = tokens.to(device, non_blocking=True)
        collect: AbstractContextManager[list[Route]] = self._capture.collect() if self._capture else nullcontext([])
        with self._autocast(), collect as routes:
            logits_BSV = self._model(input_ids=tokens[:, :-1], use_cache=False).logits
        language_loss = F.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")
        losses = {name: strategy.losses(routes).mean() for name, strategy in self._strategies.items()}
        loss = language_loss / step_tokens
        for name, value in losses.items():
            loss = loss + self.config.balance[name] / num_micro * value
        # The gradients of the processes are averaged, but each is a share of one sum.
        self._accelerator.backward(loss * world)
        counts = [balance.count_routes(routes).flatten()] if routes else []
        parts = [language_loss.detach().reshape(1), *(value.detach().reshape(1) for value in losses.values()), *counts]
        return torch.cat([part.to(_sum_dtype(device)) for part in parts])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._accelerator.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _not_finite(self, loss: float, grad_norm: float) -> str:
        what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
        saved = state.saved_steps(self.config.out)
        good = (
            f"the last good checkpoint is {state.step_folder(self.config.out, saved[-1])}" if saved else "none is saved"
        )
        return (
            f"{what} at step {self.step + 1}; stopped before the update, {good}. Lower --lr or --grad-clip, or use"
            " --precision fp32, in another OUT (MODEL may be that checkpoint)"
        )

    @torch.no_grad()
    def _validate(self, log: MetricsLog | None, progress: Progress) -> None:
        """Mean loss over all tokens of each validation set, the work shared by all processes."""
        accelerator, val = self._accelerator, self._corpus.val
        device = accelerator.device
        self._core.eval()
        losses = {}
        for done, (name, stream) in enumerate(val.items()):
            progress("validate", done, len(val), name)
            sums = torch.zeros(2, dtype=_sum_dtype(device), device=device)
            for inputs_BS, labels_BS in validation_batches(
                stream, self.config, accelerator.process_index, accelerator.num_processes
            ):
                with self._autocast():
                    logits_BSV = self._core(input_ids=inputs_BS.to(device), use_cache=False).logits
                labels = labels_BS.flatten().to(device)
                sums[0] += F.cross_entropy(
                    logits_BSV.flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
                )
                sums[1] += (labels != IGNORED).sum()
            total, count = accelerator.reduce(sums).tolist()
            losses[name] = total / count
        if val:
            progress("validate", len(val), len(val))
            if log:
                log.append({"step": self.step, "val": losses})

    def _so_far(self) -> dict[str, Any]:
        samples = self.step * self.config.global_batch_size
        return {"steps": self.step, "tokens": samples * self.config.seq_len, "ledger": self._mixture.ledger(samples)}

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            state.save_step(self.config.out, self.step, self._fill, self.config.keep_checkpoints)
        self._accelerator.wait_for_everyone()

    def _fill(self, folder: Path) -> None:
        entry = {"command": "cpt", "moetool": __version__, "torch": torch.__version__, "seed": self.config.seed}
        entry |= {"options": self.config.to_json(), **self._so_far()}
        save_checkpoint(self._core, self.config.model, folder, self._dtype, entry)
        master = self._dtype != "float32"
        state.save_training_state(folder, self._core, self._raw_optimizer, self.step, self._identity, master)


def make_accelerator() -> Accelerator:
    """accelerate's view of the machine; mixed precision and accumulation are the loop's own.

    Raises:
        ConfigError: accelerate sees another number of processes than were launched: they would be so
            many separate runs that write one folder.
    """
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    accelerator.gradient_accumulation_steps = 1
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, accelerate sees {accelerator.num_processes}; on a CPU launch with"
            " ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m moetool cpt ..."
        )
    return accelerator


def _load(folder: Path, device: torch.device) -> Any:
    from transformers import GenerationConfig

    model = load_model(folder, "float32", str(device))
    # Never Hugging Face's pooled balance loss. The source's generation settings are copied as they
    # are; transformers refuses to save some that it loads.
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig()
    return model


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no double precision
