"""The evaluation: models in turn, one in memory at a time, and tasks in turn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval.loggers.utils import add_tokenizer_info
from lm_eval.utils import handle_non_serializable

from moetool.checkpoint.model import free_models, load_model, load_tokenizer, skeleton
from moetool.errors import CheckpointError, DataError, EvaluationError
from moetool.evaluate import cache
from moetool.evaluate.harness import Harness
from moetool.evaluate.lookup import one_line
from moetool.evaluate.process_group import from_first
from moetool.evaluate.settings import Settings
from moetool.evaluate.tasks import Tasks, describe, digest
from moetool.launch import is_first, num_processes
from moetool.mesh import check_model, distributed, mesh_of
from moetool.progress import Progress, silent
from moetool.routing.capture import has_routers
from moetool.routing.report import domain_entry
from moetool.routing.stats import RoutingStats


@dataclass
class Evaluation:
    """The outcome.

    Attributes:
        entries: model -> task -> {results, samples, routing, model_info, tokenizer_info, date}, where
            results is lm-eval's document for that one task.
        failed: one {model, task, reason} per failed pair.
        num_kept: pairs answered from an earlier run.
    """

    entries: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    num_kept: int = 0


def check_models(models: Mapping[str, Path]) -> None:
    """Refuse anything but a complete checkpoint with a tokenizer, before anything runs.

    Raises:
        CheckpointError: a configuration, shard or header is missing or damaged.
        DataError: no tokenizer.
    """
    for folder in models.values():
        cache.checkpoint_identity(folder)
        load_tokenizer(folder)


def evaluate(
    models: Mapping[str, Path],
    tasks: Tasks,
    settings: Settings,
    out: Path | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate every model on every task.

    A pair that fails is recorded, and the others continue. With several processes it ends the evaluation, because the
    others may wait for the one that has failed.

    Args:
        models: name -> checkpoint folder.
        tasks: from `load_tasks`.
        settings: for running the models.
        out: the folder where results are saved as they come, and found again; None keeps them only in memory.
        progress: called with the finished pairs, and the requests of the current pair.

    Raises:
        CheckpointError: a folder is not a complete checkpoint (before any is loaded).
        EvaluationError: a pair has failed in one of several processes.
    """
    identities = {name: cache.checkpoint_identity(folder) for name, folder in models.items()}
    evaluation = Evaluation()
    configs = {name: describe(task, tasks.texts.get(name)) for name, task in tasks.tasks.items()}
    digests: dict[str, str] = {}
    for number, (name, task) in enumerate(tasks.tasks.items()):
        progress("build requests", number, len(configs), name)
        try:
            digests[name] = digest(task, configs[name], settings.limit)
        except Exception as error:  # a task runs its authors' code
            evaluation.failed.append({"model": "", "task": name, "reason": one_line(error)})
    progress("build requests", len(configs), len(configs))
    decisive = {
        "dtype": settings.dtype,
        "routing": settings.routing,
        "log_samples": settings.log_samples,
        "limit": settings.limit,
    }
    total, several = len(models) * len(digests), num_processes() > 1
    for number, (model_name, folder) in enumerate(models.items()):
        keys = {task: cache.key(identities[model_name], digests[task], decisive) for task in digests}
        kept = {task: cache.read(out, key, task) for task, key in keys.items()} if is_first() else {}
        entries = from_first({task: entry for task, entry in kept.items() if entry is not None})
        evaluation.num_kept += len(entries)
        left = [task for task in digests if task not in entries]
        progress("evaluate", number * len(keys) + len(entries), total, model_name)
        try:
            with _loaded(folder, settings) if left else _nothing() as lm:
                for name in left:
                    progress("evaluate", number * len(keys) + len(entries), total, f"{model_name}: {name}")
                    try:
                        results, stats = lm.run(
                            name, tasks.tasks[name], settings.limit, settings.allow_code_execution, progress
                        )
                    except Exception as error:  # a task runs its authors' code
                        if several and not isinstance(error, EvaluationError):
                            # The other processes may wait for this one; the launcher ends them.
                            raise EvaluationError(f"{name} on {model_name} failed: {one_line(error)}") from None
                        evaluation.failed.append({"model": model_name, "task": name, "reason": one_line(error)})
                        continue
                    if results is None:  # only the first process has results
                        continue
                    entries[name] = _entry(lm, name, results, stats, configs[name], settings)
                    cache.write(out if is_first() else None, keys[name], entries[name])
        except (CheckpointError, DataError) as error:
            if several:  # as above
                raise
            evaluation.failed += [{"model": model_name, "task": name, "reason": str(error)} for name in left]
        evaluation.entries[model_name] = {name: entries[name] for name in digests if name in entries}
    progress("evaluate", total, total)
    return evaluation


@contextmanager
def _nothing() -> Iterator[Any]:
    yield None


@contextmanager
def _loaded(folder: Path, settings: Settings) -> Iterator[Harness]:
    """Load the model, and free it afterwards."""
    tokenizer = load_tokenizer(folder)
    mesh = mesh_of(settings)
    device = None if settings.device_map or not mesh.whole else settings.device
    if not mesh.whole:
        check_model(mesh, skeleton(folder))
    model = load_model(folder, settings.dtype, device, settings.device_map, distributed(mesh))
    routing = settings.routing and has_routers(model)
    try:
        yield Harness(model, tokenizer, folder, settings.batch_size, routing, shared=not mesh.whole)
    finally:
        del model
        free_models()


def _entry(
    lm: Harness, name: str, results: Any, stats: RoutingStats | None, config: dict[str, Any], settings: Settings
) -> dict[str, Any]:
    samples = results.pop("samples")[name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    samples.sort(key=lambda sample: (filters.index(sample["filter"]), sample["doc_id"]))  # from several processes
    if not settings.log_samples:  # paired differences need only this
        samples = [{k: s[k] for k in ("doc_id", "filter", "metrics", *s["metrics"])} for s in samples]
    results["configs"][name] = config
    tokenizer_info: dict[str, Any] = {}
    add_tokenizer_info(tokenizer_info, lm)
    entry = {
        "results": results,
        "samples": samples,
        "routing": domain_entry(stats) if stats is not None else None,
        "model_info": lm.get_model_info(),
        "tokenizer_info": tokenizer_info,
        "date": datetime.now().isoformat().replace(":", "-"),
    }
    # Through JSON, so that a result is the same whether it was saved or just computed.
    plain: dict[str, Any] = json.loads(json.dumps(entry, default=handle_non_serializable))
    return plain
