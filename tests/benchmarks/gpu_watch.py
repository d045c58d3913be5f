"""The real `moetool` in this process, with a stopwatch on its training loop.

    python -m tests.benchmarks.gpu_watch REPORT.json SETTINGS cpt MODEL OUT ...

SETTINGS is JSON; all are optional:

* steps: stop after that many, without a save; seconds: or when the steps have taken so long (5 at least).
* kill: SIGKILL itself before the step after this one.
* gradients: a file for the routers' gradients of the first step.
* profile: the step to profile.
* quickstart: constants of `moetool.quickstart` to change.

The report is written after every step, so that it is there whatever happens.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

LEAST_STEPS = 5


class Watch:
    """Looks on while a run trains.

    Attributes:
        seen: the report: `first_step` (time of day), `plan`, `step_seconds`, `save_seconds` (without the next
            step's gradient, which a save computes: training stands still meanwhile), `written_seconds` (from the
            beginning of the last save until its folder is there), `peak` and `reserved` bytes, `profile`.
    """

    def __init__(self, report: Path, settings: dict[str, Any]) -> None:
        self.report, self.settings = report, settings
        self.seen: dict[str, Any] = {"step_seconds": [], "save_seconds": []}
        self._gradient_seconds = 0.0
        self._left = 0.0  # when the last save returned
        self._first = True

    def install(self) -> None:
        """Put itself around four methods of the loop."""
        from moetool.train.loop import Run

        originals = {name: getattr(Run, name) for name in ("_update", "_gradient", "_save", "_saved")}
        watch = self

        def update(run: Any) -> Any:
            return watch.update(run, originals["_update"])

        def gradient(run: Any) -> Any:
            return watch.gradient(run, originals["_gradient"])

        def save(run: Any, kind: str) -> Any:
            return watch.save(run, kind, originals["_save"])

        def saved(run: Any) -> None:
            originals["_saved"](run)
            if watch.seen["save_seconds"]:
                watch.seen["written_seconds"] = watch.seen["save_seconds"][-1] + time.perf_counter() - watch._left
                watch.write()

        for name, wrapped in (("_update", update), ("_gradient", gradient), ("_save", save), ("_saved", saved)):
            setattr(Run, name, wrapped)

    def update(self, run: Any, original: Any) -> Any:
        done = len(self.seen["step_seconds"])
        if done == 0:
            self.seen |= {"first_step": time.time(), "plan": dict(run.plan.values)}
        if done == self.settings.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        enough = self.settings.get("seconds") and sum(self.seen["step_seconds"]) > self.settings["seconds"]
        if done == self.settings.get("steps") or (enough and done >= LEAST_STEPS):
            os._exit(0)
        began = time.perf_counter()
        if done + 1 == self.settings.get("profile"):
            row, self.seen["profile"] = profiled(lambda: original(run))
        else:
            row = original(run)
        self.seen["step_seconds"].append(time.perf_counter() - began)
        self.seen.setdefault("losses", []).append(row["loss"])
        self.write()
        return row

    def gradient(self, run: Any, original: Any) -> Any:
        began = time.perf_counter()
        result = original(run)
        if self._first and self.settings.get("gradients"):
            save_router_gradients(run.core, Path(self.settings["gradients"]))
        self._first = False
        self._gradient_seconds = time.perf_counter() - began
        return result

    def save(self, run: Any, kind: str, original: Any) -> Any:
        began, self._gradient_seconds = time.perf_counter(), 0.0
        result = original(run, kind)
        self._left = time.perf_counter()
        self.seen["save_seconds"].append(self._left - began - self._gradient_seconds)
        self.write()
        return result

    def write(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.seen["peak"] = torch.cuda.max_memory_allocated()
            self.seen["reserved"] = torch.cuda.max_memory_reserved()
        partial = self.report.with_suffix(".partial")
        partial.write_text(json.dumps(self.seen))
        partial.replace(self.report)


def save_router_gradients(model: Any, file: Path) -> None:
    """The gradients of the routers' weights, in fp32."""
    from safetensors.torch import save_file

    found = {
        name.removeprefix("_orig_mod."): parameter.grad.float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if name.endswith((".gate.weight", ".router.weight")) and parameter.grad is not None
    }
    if not found:
        raise RuntimeError("no router has a gradient in its parameter")
    save_file(found, file)


def profiled(step: Any) -> tuple[Any, dict[str, Any]]:
    """Run a step under torch.profiler.

    Returns:
        What it returned; `seconds`, `cpu_seconds`, `gpu_seconds` and the 12 operations with the most time on the
        GPU (on the CPU without one), each with its calls.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    began = time.perf_counter()
    with profile(activities=activities, acc_events=True) as profiler:
        row = step()
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    averages = profiler.key_averages()
    on_cpu = [event for event in averages if event.device_type.name == "CPU"]
    kernels = [
        event
        for event in averages
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]

    def own(event: Any) -> float:
        return float(event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e6

    def rows(events: list[Any]) -> list[dict[str, Any]]:
        top = sorted(events, key=own, reverse=True)[:12]
        return [{"name": event.key[:80], "seconds": own(event), "calls": event.count} for event in top]

    found = {
        "seconds": seconds,
        "cpu_seconds": sum(event.self_cpu_time_total for event in on_cpu) / 1e6,
        "gpu_seconds": sum(event.self_device_time_total for event in kernels) / 1e6 if gpu else None,
        "kernels": sum(event.count for event in kernels),
        "operations": rows(on_cpu),
        "top_kernels": rows(kernels),
    }
    return row, found


def main() -> None:
    report, settings, *arguments = sys.argv[1:]
    options = json.loads(settings)
    if options.get("quickstart"):
        from moetool import quickstart

        for name, value in options["quickstart"].items():
            setattr(quickstart, name, value)
    if arguments[0] == "cpt":
        Watch(Path(report), options).install()
    from moetool.cli import run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
