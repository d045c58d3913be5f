"""The training loop: owns its batches, random generators and schedule.

accelerate (see accelerator.py) gives devices, processes and gathering. The model after N updates is the
model of step N.

Shapes: V vocabulary, E experts, L layers, T tokens of a micro-batch.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moetool import __version__
from moetool.checkpoint.step_folder import METRICS, STEPS, WEIGHTS
from moetool.errors import ConfigError
from moetool.progress import Progress, silent
from moetool.routing.capture import Route, RouterCapture
from moetool.train import balance, mixed, resume, state
from moetool.train.accelerator import (
    accumulating,
    clip_shards,
    mean_gradients,
    peak_memory,
    sum_dtype,
    total,
    track,
)
from moetool.train.assignment import FILES
from moetool.train.batches import MicroBatch, micro_batches
from moetool.train.export import BALANCE, Layout, buffers, publish, save_beside
from moetool.train.interrupt import noting
from moetool.train.loss import LanguageLoss, logits, token_loss
from moetool.train.metrics_log import LOADS, MetricsLog, load_row, routing_row, summarize
from moetool.train.optimizer import rounding_seed, set_rate
from moetool.train.router_gradient import RouterGradient
from moetool.train.run_plan import RunPlan
from moetool.train.saving import Saver
from moetool.train.selection import Strategy
from moetool.train.signs import Seen, Signs, unseen
from moetool.train.teacher import Teacher
from moetool.train.terms import Forward, Need, Sums, Taught
from moetool.train.validate import validate_all


class Gradient(NamedTuple):
    """A gradient stored in the parameters: sums over its step, its norm before clipping, its seconds."""

    sums: Sums
    norm: float
    seconds: float


@dataclass
class Run:
    """A training run, ready to continue from `step`.

    Attributes:
        plan: of it.
        core: the model, not wrapped.
        model: the same, wrapped for its processes.
        weights: what the optimizer updates, by parameter name.
        optimizer: AdamW over them.
        updates: the same, wrapped for its processes.
        capture: on the routers; None for a dense model.
        strategies: those that are more than a loss of routes, by name.
        router_gradient: where routers learn from experts that were not chosen.
        language_loss: see loss.py.
        teacher: see teacher.py; None where there is none.
        layout: of the model on disk.
        saver: writes its step folders.
        warnings: what was seen in the weights, and the user should know before they are trained.
        step: updates made.
    """

    plan: RunPlan
    core: Any
    model: Any
    weights: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    updates: Any
    capture: RouterCapture | None
    strategies: Mapping[str, Strategy]
    router_gradient: RouterGradient | None
    language_loss: LanguageLoss
    teacher: Teacher | None
    layout: Layout
    saver: Saver
    warnings: Sequence[str]
    step: int
    _ahead: Gradient | None = None
    _fetched: tuple[int, list[MicroBatch]] = (-1, [])

    def claim(self) -> None:
        """Make OUT this run's; a command that was refused before has deleted nothing there."""
        config, accelerator = self.plan.config, self.plan.accelerator
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state.claim(config.out, {"options": config.to_json(), "sources": self.plan.values["sources"]})
            state.withdraw(config.out)
            if not config.resume:
                state.clear(config.out)
            state.go_back(config.out, self.step)
        if config.log_with:
            accelerator.init_trackers("moetool", {key: str(value) for key, value in config.to_json().items()})

    def train(self, progress: Progress = silent, seen: Seen = unseen) -> None:
        """Train to the last step, validating and saving on the way, in an OUT that is claimed.

        Ctrl-C and SIGTERM end it after the step that is under way, with a checkpoint; then they act.

        Args:
            progress: reports each step.
            seen: gets each training row and the signs of trouble in it, in the process that writes them.

        Raises:
            ConfigError: the loss or the gradient is not finite; nothing that led to it is saved.
        """
        config = self.plan.config
        log = self._metrics()
        signs = Signs(log.rows() if log and self.step else (), config.to_json())

        def tell() -> None:
            progress("train", self.step, config.max_steps, "stopping after this step; a second signal stops at once")

        with self.saver, noting(tell) as noted:
            if self.step == 0:
                self._validate(log, progress)
            while self.step < config.max_steps:
                row = self._update()
                self._log(log, row)
                if log:
                    seen(row, signs.see(row))
                note = f"loss {row['loss']:.3f}"  # a narrow terminal cuts off the end
                note += f"  mri {max(row['mri']):.2f}" if "mri" in row else ""
                note += f"  {row['tokens_per_second']:.0f} tok/s  lr {row['lr']:.1e}"
                note += f"  {row['mfu']:.0%} MFU" if "mfu" in row else ""
                note += f"  KL {row['teacher']:.3f}" if "teacher" in row else ""
                progress("train", self.step, config.max_steps, note)
                last = self.step == config.max_steps
                if last or self.step % config.eval_every == 0:
                    self._validate(log, progress)
                signalled, failed = self._any(bool(noted.signum), self.saver.failed())
                stopping = signalled and not last
                if failed:
                    self.saver.wait()
                if config.keep_weights and self.step % config.keep_weights == 0:
                    self._save(WEIGHTS)  # first: a run that goes on from this step must have it
                if last or stopping or self.step % config.save_every == 0:
                    self._save(STEPS)
                if last or stopping:
                    self._saved()
                if stopping:
                    break
        if self.step < config.max_steps:
            signum = noted.signum or signal.SIGTERM
            signal.raise_signal(signum)
            raise SystemExit(128 + signum)  # of another process, and ignored here

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Make the last step the run's result, and OUT a finished run.

        Args:
            more: what else is told in the summary.

        Returns:
            The summary, which also lies in OUT/summary.json; empty in all processes but the first.
        """
        config, accelerator, out = self.plan.config, self.plan.accelerator, self.plan.config.out
        log = self._metrics()
        summary: dict[str, Any] = {}
        if log:
            summary = {**self._so_far(), **summarize(log, config.seq_len * config.global_batch_size, config.train)}
            summary |= more
        publish(state.step_folder(out, self.step), out, {**summary, "identity": self.plan.identity}, self.saver.ranks)
        if log:
            state.release(out)
        accelerator.wait_for_everyone()
        return summary

    def _metrics(self) -> MetricsLog | None:
        """metrics.jsonl up to this step, in the process that writes it."""
        config = self.plan.config
        return MetricsLog(config.out / METRICS, self.step) if self.plan.accelerator.is_main_process else None

    def _log(self, log: MetricsLog | None, row: dict[str, Any]) -> None:
        if log:
            log.append(row)
        if self.plan.config.log_with:
            track(self.plan.accelerator, row)

    def _any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process, so that all do the same."""
        accelerator = self.plan.accelerator
        if accelerator.num_processes == 1:  # a device would have to be waited for
            return list(flags)
        counts = accelerator.reduce(torch.tensor(flags, dtype=torch.int32, device=accelerator.device)).tolist()
        return [bool(count) for count in counts]

    def _update(self) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics."""
        plan, config = self.plan, self.plan.config
        sums, norm, seconds = self._ahead or self._gradient()
        self._ahead = None
        began = time.perf_counter()
        lr = plan.schedule(self.step)
        set_rate(self.optimizer, lr)
        if not config.master_weights:
            torch.manual_seed(rounding_seed(config.seed, self.step))
        self.updates.step()
        self.updates.zero_grad()
        if config.keeps_copies:
            mixed.cast_back(self.weights, self.core)
        self.step += 1

        step_tokens = config.seq_len * config.global_batch_size
        num_micro = config.global_batch_size // config.micro_batch_size
        row: dict[str, Any] = {"step": self.step, "loss": float(sums.loss) / step_tokens, "lr": lr, "grad_norm": norm}
        if sums.taught.any():  # a step may have no sequence with a teacher
            row["teacher"] = float(sums.taught[0] / sums.taught[1])
        row["balance"] = {name: float(value) / num_micro for name, value in sums.terms.items()}
        row["num_tokens"] = self.step * step_tokens
        ledger = plan.mixture.ledger(self.step * config.global_batch_size)
        row["sources"] = {name: entry["tokens"] for name, entry in ledger.items()}
        if self.capture is not None:
            row |= {name.replace("-", "_"): state.tolist() for name, state in balance.state(self.strategies).items()}
            for strategy in self.strategies.values():
                strategy.update(sums.counts_LE, self.step)
            if self.router_gradient:
                self.router_gradient.update(sums.counts_LE, partial(total, plan.accelerator, config.mesh))
            counts_LE = sums.counts_LE.long().numpy()
            row |= routing_row(counts_LE, step_tokens)
            if self.step in (1, config.max_steps) or self.step % max(1, config.max_steps // LOADS) == 0:
                row["load"] = load_row(self.capture.layers, counts_LE)
        row["tokens_per_second"] = step_tokens / (seconds + time.perf_counter() - began)
        if plan.peak_flops:
            operations = row["tokens_per_second"] * plan.values["flops_per_token"]
            row["mfu"] = operations / plan.peak_flops / plan.accelerator.num_processes
        return row | peak_memory(plan.accelerator.device)

    def _gradient(self) -> Gradient:
        """The gradient of the next step, left in the parameters.

        Raises:
            ConfigError: the loss or the gradient is not finite.
        """
        config, accelerator = self.plan.config, self.plan.accelerator
        began = time.perf_counter()
        fetched, batch = self._fetched
        if fetched != self.step:
            batch = self._fetch(self.step)
        dtype, step_tokens = sum_dtype(accelerator.device), config.seq_len * config.global_batch_size
        flat: Tensor = torch.zeros((), dtype=dtype, device=accelerator.device)
        counted = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.model.train()
        for micro in batch:
            torch.manual_seed(micro.seed)
            with accumulating(accelerator, self.model, micro is batch[-1]):
                forward = self._forward(micro, counted)
                sums, counted = self._backward(forward, step_tokens), forward.step_counts_LE
            flat = flat + sums.flat(dtype)
            del forward  # whose routes need not be there beside the next one's
        norm = self._clip()
        self._fetched = self.step + 1, self._fetch(self.step + 1)  # while the device works
        # One reduction and one wait for the device per step.
        flat = torch.cat([total(accelerator, config.mesh, flat), norm.detach().reshape(1).to(flat)]).cpu()
        sums, grad_norm = sums.named(flat[:-1]), float(flat[-1])
        loss = float(sums.loss) / step_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"the gradient norm is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
            raise ConfigError(self._stopped(f"{what} at step {self.step + 1}; stopped before the update"))
        return Gradient(sums, grad_norm, time.perf_counter() - began)

    def _clip(self) -> Tensor:
        """Average the gradient over the processes where nothing has done so, and clip it; returns its norm before."""
        config, accelerator = self.plan.config, self.plan.accelerator
        # Where the weights lie in host memory, the model's parameters gather the gradient.
        graded = list(self.core.parameters() if config.moments == "offload" else self.weights.values())
        most = config.grad_clip or math.inf
        if not config.mesh.whole:
            return clip_shards(graded, most)
        if config.keeps_copies:
            mean_gradients(accelerator, graded)
        norm: Tensor = accelerator.clip_grad_norm_(graded, most)
        return norm

    def _fetch(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step, where they can be copied to a GPU while it computes."""
        accelerator, config = self.plan.accelerator, self.plan.config
        rank = config.mesh.rank(accelerator.process_index)
        batch = micro_batches(self.plan.mixture, config, step, rank, config.mesh.data_parallel)
        return [micro.ready_for(accelerator.device) for micro in batch]

    def _needed(self, need: Need) -> bool:
        """Whether a term of the loss needs that."""
        return any(need in term.needs for term in self.plan.terms.values())

    def _forward(self, micro: MicroBatch, earlier_LE: Tensor) -> Forward:
        """Run a micro-batch through the model; `earlier_LE` are the `step_counts_LE` of the one before, or 0."""
        accelerator, device = self.plan.accelerator, self.plan.accelerator.device
        collect: AbstractContextManager[list[Route]] = self.capture.collect() if self.capture else nullcontext([])
        logits_TV = torch.empty(0, 0, device=device)
        taught: Taught | None = None
        with collect as routes:
            if self._needed("logits"):
                logits_TV = logits(self.model, micro, device).flatten(0, 1).float()
                language_loss = token_loss(logits_TV, micro)
            elif self.teacher:
                language_loss, taught = self.teacher.teach(*self.teacher.read(self.model, micro, device), micro)
            else:
                language_loss = self.language_loss(self.model, micro, device)
        if self.teacher and taught is None:
            language_loss, taught = self.teacher.teach(logits_TV, None, micro)
        if self.router_gradient:
            self.router_gradient.collect()
        counts_LE = step_counts_LE = balance.count_routes(routes)
        if self._needed("step counts"):
            step_counts_LE = earlier_LE + total(accelerator, self.plan.config.mesh, counts_LE)
        return Forward(micro, language_loss, routes, counts_LE, step_counts_LE, logits_TV, taught)

    def _backward(self, forward: Forward, step_tokens: int) -> Sums:
        """Add a micro-batch's share of its step's gradient; returns its sums for the step's metrics."""
        config, accelerator, terms = self.plan.config, self.plan.accelerator, self.plan.terms
        num_micro = config.global_batch_size // config.micro_batch_size
        values = {name: term.values(forward).mean() for name, term in terms.items()}
        taught = forward.taught
        loss = (taught.trained if taught else forward.language_loss) / step_tokens
        for name, value in values.items():
            loss = loss + terms[name].coefficient / num_micro * value
        # The gradients of the processes are averaged, but each is a share of one sum.
        accelerator.backward(loss * config.mesh.data_parallel)
        detached = {name: value.detach() for name, value in values.items()}
        sums_2 = taught.sums_2 if taught else loss.new_empty(0)
        return Sums(forward.language_loss.detach(), sums_2, detached, forward.counts_LE)

    def _saved(self) -> None:
        """Wait in all processes until the last step is written: a launcher ends them all when one has ended."""
        self.saver.wait()
        self.plan.accelerator.wait_for_everyone()

    def _stopped(self, what: str) -> str:
        out, precision = self.plan.config.out, self.plan.config.precision
        with suppress(Exception):  # this has failed before
            self._saved()
        saved = state.saved_steps(out)
        good, where = "no checkpoint is saved", "and run it again"
        if saved:
            good = f"the last good checkpoint is {state.step_folder(out, saved[-1])}"
            where = "and start a run in another OUT (MODEL may be that checkpoint)"
        exact = ", or use --precision fp32," if precision == "bf16" else ""
        return f"{what}, {good}. Lower --lr or --grad-clip{exact} {where}"

    def _validate(self, log: MetricsLog | None, progress: Progress) -> None:
        """Validate on every set and log a row."""
        plan = self.plan
        losses, routing = validate_all(
            self.core, self.capture, self.language_loss, plan.corpus.val, plan.config, plan.accelerator, progress
        )
        if losses:
            self._log(log, {"step": self.step, "val": losses} | ({"routing": routing} if routing else {}))

    def _so_far(self) -> dict[str, Any]:
        samples, ledger = self.step * self.plan.config.global_batch_size, self.plan.mixture.ledger
        return {"steps": self.step, "tokens": samples * self.plan.config.seq_len, "ledger": ledger(samples)}

    def _save(self, kind: str) -> None:
        """Have a step folder or a snapshot written, once the next step's gradient shows that the update was no ruin."""
        self._ahead = self._ahead or self._gradient()
        plan, config, step, layout, ranks = self.plan, self.plan.config, self.step, self.layout, self.saver.ranks
        moments = dict(resume.moments(self.weights, self.optimizer))
        states = balance.state(self.strategies) | (self.router_gradient.state if self.router_gradient else {})
        states = {BALANCE + name: tensor for name, tensor in states.items()}
        tensors = {**buffers(self.core), **self.weights, **moments, **states}
        units = [*layout.units, *((name,) for name in (*moments, *states))]
        entry = {"command": "cpt", "moetool": __version__, "torch": torch.__version__, "seed": config.seed}
        entry |= {name: plan.identity[name] for name in ("model", "teacher") if name in plan.identity}
        entry |= {"options": config.to_json(), **self._so_far()}

        def write(put: Callable[[Path], dict[str, str]]) -> None:
            def fill(folder: Path) -> None:
                digests = put(folder)
                if ranks.is_main:
                    save_beside(layout, folder, config.model, entry)
                    if kind == STEPS:
                        resume.save(folder, digests, layout.dtype != "float32", step, plan.identity)

            keep = config.keep_checkpoints if kind == STEPS else None
            state.save_step(state.step_folder(config.out, step, kind), fill, keep, ranks)

        files = FILES if kind == STEPS else ("model",)
        self.saver.save(tensors, units, lambda whole: layout.contents(whole, step), write, files)
