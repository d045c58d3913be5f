"""The training loop: owns its batches, random generators and schedule.

accelerate (see processes.py) gives devices, processes and gathering. The model after N updates is the
model of step N.

Shapes: B sequences, S their length, V vocabulary, E experts, L layers.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetool import __version__
from moetool.checkpoint.model import load_model
from moetool.errors import CheckpointError, ConfigError
from moetool.progress import Progress, silent
from moetool.routing.capture import Route, RouterCapture, has_routers
from moetool.train import balance, memory, mixed, resume, schedules, state
from moetool.train.batches import Corpus, MicroBatch, micro_batches, mix
from moetool.train.config import TrainConfig
from moetool.train.execution import apply_execution, evaluating
from moetool.train.export import publish, save_checkpoint, source_dtype
from moetool.train.interrupt import noting
from moetool.train.loss import chunked_loss, whole_loss
from moetool.train.metrics import MetricsLog, routing_row, summarize
from moetool.train.optimizer import adamw, rounding_seed, set_rate
from moetool.train.plan import describe, memory_warnings, untrained_routers, validation_warnings
from moetool.train.processes import (
    Accelerator,
    accumulating,
    autocast,
    is_mixed,
    is_sharded,
    mean_gradients,
    number,
    prepare,
    sum_dtype,
    track,
    whole,
    zero_stage,
)
from moetool.train.selection import is_selection_bias
from moetool.train.validate import check_documents_apart, validate


class Run:
    """A training run, ready to go on from `step` once it is loaded.

    Attributes:
        config: resolved.
        step: updates made.
        plan: what it is going to do, as plain values.
        warnings: what the user should know before it trains.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        skeleton: Any,
        corpus: Corpus,
        identity: dict[str, Any],
        step: int,
    ) -> None:
        self.config, self.step = config, step
        self._accelerator, self._corpus, self._identity = accelerator, corpus, identity
        self._mixture = mix(corpus, config)
        self._schedule = schedules.build(config.schedule, config.max_steps, vars(config))
        self._dtype = source_dtype(config.model) if config.save_dtype == "auto" else config.save_dtype
        self._losses = balance.build_losses(config.balance)

        shared = accelerator.num_processes, is_sharded(accelerator), zero_stage(accelerator)
        plan = describe(config, skeleton, self._mixture, corpus, *shared)
        where = {"device": str(accelerator.device), "num_processes": accelerator.num_processes}
        self.plan = {**plan, "step": step, "save_dtype": self._dtype, **where}

        def fitting(there: int) -> list[tuple[str, int]]:
            return memory.smaller(skeleton, config, there, *shared)

        self.warnings = memory_warnings(self.plan["memory"], accelerator.device, fitting)
        self.warnings += validation_warnings(self.plan["val"], config)
        self._peak_flops = memory.peak_flops(accelerator.device, config.precision)
        self._ahead: tuple[list[float], float, float] | None = None
        self._fetched: tuple[int, list[MicroBatch]] = (-1, [])

    def load(self) -> None:
        """Load the weights, and the optimizer's moments where there are some; then OUT is this run's.

        Adds to `warnings`.

        Raises:
            CheckpointError: they cannot be loaded.
            ConfigError: the model cannot be trained like this.
        """
        config, accelerator, step = self.config, self._accelerator, self.step
        start = state.step_folder(config.out, step) if step else config.model
        try:
            # A model that is going to be sharded may be too large for one device.
            self._core = _load(start, torch.device("cpu") if is_sharded(accelerator) else accelerator.device)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {resume.ADVICE}" if step else str(error)) from None
        self._capture = RouterCapture(self._core) if has_routers(self._core) else None
        self._selections = balance.build_selections(config.balance, self._core, self._capture) if self._capture else []
        if self._capture and config.freeze_router:
            balance.freeze_routers(self._capture)
        if self._capture and not config.freeze_router:
            self.warnings += untrained_routers(self._core, self._capture, list(self._losses))
        if not config.cross_document:
            check_documents_apart(self._core)
        advice = resume.ADVICE if step else resume.FRESH
        if step or config.keep_optimizer:
            resume.load_weights(start, self._core, advice)
        half = is_mixed(accelerator, config.precision)
        updated = mixed.cast(self._core, self._capture, config.master_weights) if half else None
        self._language_loss = (chunked_loss(self._core, config.compile or config.liger) if half else None) or whole_loss
        apply_execution(config, self._core)
        self._raw_optimizer = adamw(updated.values() if updated else self._core.parameters(), config)
        self._model, self._optimizer = prepare(accelerator, self._core, self._raw_optimizer, config)
        self._weights = updated or dict(self._core.named_parameters())
        if step or config.keep_optimizer:
            resume.load_moments(start, self._weights, self._raw_optimizer, advice, self._model)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:  # only now: a command that is refused deletes nothing
            state.claim(config.out)
            if not config.resume:
                state.clear(config.out)
            state.set_aside(config.out, step)
        if config.log_with:
            accelerator.init_trackers("moetool", {key: str(value) for key, value in config.to_json().items()})

    def train(self, progress: Progress = silent) -> dict[str, Any]:
        """Train to the end, validating and saving on the way.

        Ctrl-C and SIGTERM end it after the step that is under way, with a checkpoint; then they act.

        Returns:
            The summary, which also lies in OUT/summary.json.

        Raises:
            ConfigError: the loss or the gradient is not finite; nothing that led to it is saved.
        """
        config, out = self.config, self.config.out
        log = MetricsLog(out / state.METRICS, self.step) if self._accelerator.is_main_process else None

        def tell() -> None:
            progress("train", self.step, config.max_steps, "stopping after this step; again: at once")

        with noting(tell) as noted:
            if self.step == 0:
                self._validate(log, progress)
            while self.step < config.max_steps:
                row = self._update()
                self._log(log, row)
                note = f"loss {row['loss']:.3f}  lr {row['lr']:.1e}  {row['tokens_per_second']:.0f} tok/s"
                note += f"  {row['mfu']:.0%} MFU" if "mfu" in row else ""
                progress("train", self.step, config.max_steps, note)
                last = self.step == config.max_steps
                if last or self.step % config.eval_every == 0:
                    self._validate(log, progress)
                stopping = not last and self._any(bool(noted.signum))
                if last or stopping or self.step % config.save_every == 0:
                    self._save()
                if stopping:
                    break
        if self.step < config.max_steps:
            signal.raise_signal(noted.signum or signal.SIGTERM)
        summary: dict[str, Any] = {}
        if log:
            summary = {**self._so_far(), **summarize(log, config.seq_len * config.global_batch_size, config.train)}
            publish(state.step_folder(out, self.step), out, {**summary, "identity": self._identity})
            state.release(out)
        self._accelerator.wait_for_everyone()
        return summary

    def _log(self, log: MetricsLog | None, row: dict[str, Any]) -> None:
        if log:
            log.append(row)
        if self.config.log_with:
            track(self._accelerator, row)

    def _any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, so that all do the same."""
        return bool(self._accelerator.reduce(torch.tensor(float(flag), device=self._accelerator.device)))

    def _update(self) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics."""
        config = self.config
        values, grad_norm, seconds = self._ahead or self._gradient()
        self._ahead = None
        began = time.perf_counter()
        lr = self._schedule(self.step)
        set_rate(self._raw_optimizer, lr)
        if not config.master_weights:
            torch.manual_seed(rounding_seed(config.seed, self.step))
        self._optimizer.step()
        self._optimizer.zero_grad()
        if is_mixed(self._accelerator, config.precision):
            mixed.cast_back(self._weights, self._core)
        self.step += 1

        step_tokens = config.seq_len * config.global_batch_size
        num_micro = config.global_batch_size // config.micro_batch_size
        row: dict[str, Any] = {"step": self.step, "loss": values[0] / step_tokens, "lr": lr, "grad_norm": grad_norm}
        row["balance"] = {name: values[1 + i] / num_micro for i, name in enumerate(self._losses)}
        row["num_tokens"] = self.step * step_tokens
        if self._capture is not None:
            counts_LE = torch.tensor(values[1 + len(self._losses) :], dtype=torch.float64).reshape(
                len(self._capture.layers), -1
            )
            for selection in self._selections:
                selection.update(counts_LE)
            row |= routing_row(counts_LE.long().numpy(), step_tokens)
        row["tokens_per_second"] = step_tokens / (seconds + time.perf_counter() - began)
        if self._peak_flops:
            devices = self._accelerator.num_processes
            row["mfu"] = row["tokens_per_second"] * self.plan["flops_per_token"] / self._peak_flops / devices
        return row

    def _gradient(self) -> tuple[list[float], float, float]:
        """The gradient of the next step, left in the parameters.

        Returns:
            Sums over the step (see `_forward_backward`), the gradient's norm, seconds.

        Raises:
            ConfigError: the loss or the gradient is not finite.
        """
        config, accelerator = self.config, self._accelerator
        began = time.perf_counter()
        world = accelerator.num_processes
        fetched, batch = self._fetched
        if fetched != self.step:
            batch = self._fetch(self.step)
        step_tokens, num_micro = config.seq_len * config.global_batch_size, len(batch) * world
        sums: Tensor = torch.zeros((), dtype=sum_dtype(accelerator.device), device=accelerator.device)
        step_counts: list[Tensor] = []
        self._model.train()
        for micro in batch:
            torch.manual_seed(micro.seed)
            with accumulating(accelerator, self._model, micro is batch[-1]):
                sums = sums + self._forward_backward(micro, step_tokens, num_micro, world, step_counts)
        if is_mixed(accelerator, config.precision):
            mean_gradients(accelerator, self._weights.values())
        norm = accelerator.clip_grad_norm_(list(self._weights.values()), config.grad_clip or math.inf)
        self._fetched = self.step + 1, self._fetch(self.step + 1)  # while the device works
        # One reduction and one wait for the device a step.
        *values, grad_norm = torch.cat([accelerator.reduce(sums), number(norm.detach()).reshape(1).to(sums)]).tolist()
        loss = values[0] / step_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
            raise ConfigError(self._stopped(f"{what} at step {self.step + 1}; stopped before the update"))
        return values, grad_norm, time.perf_counter() - began

    def _fetch(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step, where they can be copied to a GPU while it computes."""
        accelerator = self._accelerator
        batch = micro_batches(self._mixture, self.config, step, accelerator.process_index, accelerator.num_processes)
        return [micro.pinned() for micro in batch] if accelerator.device.type == "cuda" else batch

    def _forward_backward(
        self, micro: MicroBatch, step_tokens: int, num_micro: int, world: int, step_counts: list[Tensor]
    ) -> Tensor:
        """Add one micro-batch's share of the step's gradient.

        Args:
            micro: B sequences of S tokens.
            step_tokens: predicted tokens of the whole step.
            num_micro: micro-batches of the whole step.
            world: processes.
            step_counts: routes to each expert of the step's earlier micro-batches, over all processes; is
                added to where a strategy wants them.

        Returns:
            Sums for the step's metrics: language loss over tokens, each strategy's loss, routes to
            each expert (L x E).
        """
        device = self._accelerator.device
        collect: AbstractContextManager[list[Route]] = self._capture.collect() if self._capture else nullcontext([])
        with autocast(self._accelerator, self.config.precision), collect as routes:
            language_loss = self._language_loss(self._model, micro, device)
        counts_LE = balance.count_routes(routes)
        counts = {"micro-batch": counts_LE}
        if any(strategy.scope == "step" for strategy in self._losses.values()):
            step_counts.append(self._accelerator.reduce(counts_LE))
            counts["step"] = torch.stack(step_counts).sum(dim=0)
        losses = {name: loss.losses(routes, counts[loss.scope]).mean() for name, loss in self._losses.items()}
        loss = language_loss / step_tokens
        for name, value in losses.items():
            loss = loss + self.config.balance[name] / num_micro * value
        # The gradients of the processes are averaged, but each is a share of one sum.
        self._accelerator.backward(loss * world)
        parts = [language_loss, *losses.values(), counts_LE]
        return torch.cat([part.detach().flatten().to(device, sum_dtype(device)) for part in parts])

    def _stopped(self, what: str) -> str:
        saved = state.saved_steps(self.config.out)
        good, where = "none is saved", "and run it again"
        if saved:
            good = f"the last good checkpoint is {state.step_folder(self.config.out, saved[-1])}"
            where = "in another OUT (MODEL may be that checkpoint)"
        exact = ", or use --precision fp32," if self.config.precision == "bf16" else ""
        return f"{what}, {good}. Lower --lr or --grad-clip{exact} {where}"

    def _validate(self, log: MetricsLog | None, progress: Progress) -> None:
        """Validate on every set and log a row."""
        val = self._corpus.val
        self._core.eval()
        row: dict[str, Any] = {"step": self.step, "val": {}}
        for done, (name, stream) in enumerate(val.items()):
            progress("validate", done, len(val), name)
            with evaluating(self.config):
                of = self._core, self._capture, self._language_loss, stream, self.config, self._accelerator
                row["val"][name], routing = validate(*of)
            if routing:
                row.setdefault("routing", {})[name] = routing
        if val:
            progress("validate", len(val), len(val))
            self._log(log, row)

    def _so_far(self) -> dict[str, Any]:
        samples = self.step * self.config.global_batch_size
        return {"steps": self.step, "tokens": samples * self.config.seq_len, "ledger": self._mixture.ledger(samples)}

    def _save(self) -> None:
        """Write a step folder, once the next step's loss and gradient show that the last update was no ruin."""
        self._ahead = self._gradient()
        main = self._accelerator.is_main_process
        # Every process takes part in gathering, one tensor after the other; the main one keeps them.
        gathered = ((name, whole(parameter)) for name, parameter in self._weights.items())
        weights = {name: tensor for name, tensor in gathered if main}
        moments = {key: tensor for key, tensor in resume.moments(self._weights, self._raw_optimizer) if main}

        def fill(folder: Path) -> None:
            entry = {"command": "cpt", "moetool": __version__, "torch": torch.__version__, "seed": self.config.seed}
            entry |= {"options": self.config.to_json(), **self._so_far()}
            save_checkpoint(self._core, weights, self.config.model, folder, self._dtype, entry)
            master = weights if self._dtype != "float32" else None
            resume.save(folder, moments, master, self.step, self._identity)

        if main:
            state.save_step(self.config.out, self.step, fill, self.config.keep_checkpoints)
        self._accelerator.wait_for_everyone()


def _load(folder: Path, device: torch.device) -> Any:
    from transformers import GenerationConfig

    model = load_model(folder, "float32", str(device))
    # Never Hugging Face's pooled balance loss. The source's generation settings are copied as they
    # are; transformers refuses to save some that it loads.
    model.config.output_router_logits = False
    model.generation_config = GenerationConfig()
    for name, parameter in model.named_parameters():
        if is_selection_bias(name):  # no gradient reaches it, for which DDP would wait
            parameter.requires_grad_(False)
    return model
