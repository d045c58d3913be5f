"""From single results to output: one document, and lm-eval's own files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.evaluator_utils import EvalAcc, aggregate_groups
from lm_eval.loggers.utils import add_env_info, get_commit_from_path
from lm_eval.utils import hash_string, sanitize_list, sanitize_model_name

from moetool.checkpoint.folder import write_file
from moetool.evaluate.cache import is_stderr, write_json
from moetool.evaluate.evaluation import Evaluation
from moetool.evaluate.paired_scores import combine, influences, outside_noise, paired_difference, standard_error
from moetool.evaluate.settings import Settings
from moetool.evaluate.suites import Benchmark, Suite
from moetool.evaluate.tasks import Tasks

SCHEMA_VERSION = 1
_NOT_METRICS = ("name", "alias", "sample_len", "sample_count")


def build_document(
    models: Mapping[str, Path],
    tasks: Tasks,
    evaluation: Evaluation,
    baseline: str | None = None,
    suites: Mapping[str, Suite] | None = None,
) -> dict[str, Any]:
    """moetool's comparison of all models, as plain JSON values.

    Returns:
        `results`: model -> task or group -> metric (lm-eval's key, `metric,filter`) -> value, stderr,
        higher_is_better, num_documents and, with a baseline, difference {value, stderr,
        outside_noise}. `averages`: suite -> model -> value, stderr, num_tasks, difference.
    """
    results = {
        name: _scores(_merge(evaluation.entries[name], tasks), evaluation.entries[name], tasks) for name in models
    }
    failed = evaluation.failed + [{"model": "", "task": t, "reason": why} for t, why in tasks.failed.items()]
    failed += [failure for name, scores in results.items() for failure in _take_out_nan(scores, name, tasks)]
    if baseline is not None:
        for name in models:
            if name != baseline:
                _add_differences(results[name], name, baseline, evaluation, tasks)
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "models": {name: str(folder) for name, folder in models.items()},
        "baseline": baseline,
        "results": results,
        "averages": {name: _averages(results, suite) for name, suite in (suites or {}).items()},
        "routing": {
            name: {task: entry["routing"] for task, entry in entries.items() if entry["routing"]}
            for name, entries in evaluation.entries.items()
        },
        "num_kept": evaluation.num_kept,
        "failed": failed,
    }
    return document


def write_results(
    out: Path, document: dict[str, Any], tasks: Tasks, evaluation: Evaluation, settings: Settings
) -> None:
    """Write results.json (lm-eval's layout and, under `moetool`, the comparison) and the samples.

    With one model everything is in `out`. With several, each has its own folder, and
    `out`/results.json holds the comparison.
    """
    models = {name: Path(folder) for name, folder in document["models"].items()}
    environment = {"git_hash": get_commit_from_path(Path.cwd())} | _environment()
    for name, folder in models.items():
        place = out if len(models) == 1 else out / name.replace("/", "__")
        place.mkdir(parents=True, exist_ok=True)
        entries = evaluation.entries[name]
        layout = _lm_eval_layout(folder, entries, tasks, settings) | environment if entries else {}
        write_json(place / "results.json", layout | ({"moetool": document} if len(models) == 1 else {}))
        if settings.log_samples:
            _write_samples(place, entries)
    if len(models) > 1:
        write_json(out / "results.json", {"moetool": document})


@cache
def _environment() -> dict[str, Any]:
    """lm-eval's description of machine and libraries, which takes a second."""
    environment: dict[str, Any] = {}
    add_env_info(environment)
    return environment


def _merge(entries: Mapping[str, dict[str, Any]], tasks: Tasks) -> dict[str, Any]:
    """Single results as lm-eval's document of one run, with its own aggregation of groups."""
    merged = EvalAcc(groups={n: g for n, g in tasks.groups.items() if _complete(g, entries)})
    for name, entry in entries.items():
        results = entry["results"]
        merged.metrics[name] = results["results"][name]
        merged.configs[name] = results["configs"][name]
        merged.versions[name] = results["versions"][name]
        merged.num_fewshot[name] = results["n-shot"][name]
        merged.higher_is_better[name] = results["higher_is_better"][name]
        merged.n_samples[name] = results["n-samples"][name]
    document: dict[str, Any] = aggregate_groups(merged)._to_eval_results()
    return document


def _complete(group: Any, entries: Mapping[str, Any]) -> bool:
    return all(task.task_name in entries for task in group.get_all_tasks())


def _scores(merged: dict[str, Any], entries: Mapping[str, Any], tasks: Tasks) -> dict[str, Any]:
    scores: dict[str, Any] = {}
    for task, metrics in merged["results"].items():
        directions = merged["higher_is_better"].get(task, {})
        scores[task] = {}
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if key in _NOT_METRICS or is_stderr(key):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            if not isinstance(stderr, float) and task in entries:
                # lm-eval has no standard error for bits per byte.
                influence = influences(
                    tasks.tasks[task].aggregation().get(metric), list(_items(entries[task], key).values())
                )
                stderr = None if influence is None else standard_error(influence)
            scores[task][key] = {
                "value": float(value),
                "stderr": stderr if isinstance(stderr, float) and math.isfinite(stderr) else None,
                "higher_is_better": directions.get(metric),
                "num_documents": metrics["sample_len"],
            }
    return {task: metrics for task, metrics in scores.items() if metrics}


def _take_out_nan(scores: dict[str, Any], model: str, tasks: Tasks) -> list[dict[str, str]]:
    """Remove scores that are not finite from a model's results, and report each task."""
    failed = []
    for task in list(scores):
        bad = {key: score["value"] for key, score in scores[task].items() if not math.isfinite(score["value"])}
        scores[task] = {key: score for key, score in scores[task].items() if key not in bad}
        if bad and task not in tasks.groups:
            said = " and ".join(f"{key.removesuffix(',none')} is {value}" for key, value in bad.items())
            reason = f"{said}; check the weights for NaN, or use another --dtype"
            failed.append({"model": model, "task": task, "reason": reason})
        if not scores[task]:
            del scores[task]
    return failed


def _items(entry: Mapping[str, Any], key: str) -> dict[int, Any]:
    """Document -> value of one metric."""
    metric, _, filter_name = key.partition(",")
    return {s["doc_id"]: s[metric] for s in entry["samples"] if s["filter"] == filter_name and metric in s}


def _add_differences(scores: dict[str, Any], name: str, baseline: str, evaluation: Evaluation, tasks: Tasks) -> None:
    ours, theirs = evaluation.entries[name], evaluation.entries[baseline]
    for task, metrics in scores.items():
        if task in tasks.groups:
            continue
        for key, score in metrics.items():
            if task in theirs:
                aggregation = tasks.tasks[task].aggregation().get(key.partition(",")[0])
                score["difference"] = _difference(
                    *paired_difference(aggregation, _items(ours[task], key), _items(theirs[task], key))
                )
    for task, metrics in scores.items():
        if task not in tasks.groups:
            continue
        group = tasks.groups[task]
        leaves = [t.task_name for t in group.get_all_tasks()]
        for rule in group.aggregate_metric_list or []:
            for key, score in metrics.items():
                parts = [scores[leaf][key] for leaf in leaves if "difference" in scores.get(leaf, {}).get(key, {})]
                if key.partition(",")[0] == rule.metric and len(parts) == len(leaves):
                    weights = [float(p["num_documents"]) for p in parts] if rule.weight_by_size else None
                    pairs = [(p["difference"]["value"], p["difference"]["stderr"]) for p in parts]
                    score["difference"] = _difference(*combine(pairs, weights))


def _difference(value: float, stderr: float | None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "outside_noise": outside_noise(value, stderr)}


def _averages(results: Mapping[str, Any], suite: Suite) -> dict[str, Any]:
    """Model -> mean of the suite's own metrics, over the benchmarks that every model has."""
    common = [
        benchmark
        for benchmark in suite.benchmarks
        if all(benchmark.metric in scores.get(benchmark.task, {}) for scores in results.values())
    ]
    averages: dict[str, Any] = {}
    for model, scores in results.items() if common else ():
        parts = [scores[benchmark.task][benchmark.metric] for benchmark in common]
        value, stderr = combine([_scaled(p, b) for p, b in zip(parts, common, strict=True)])
        averages[model] = {"value": value, "stderr": stderr, "num_tasks": len(parts)}
        if all("difference" in p for p in parts):
            differences = [_scaled(p["difference"], b) for p, b in zip(parts, common, strict=True)]
            averages[model]["difference"] = _difference(*combine(differences))
    return averages


def _scaled(score: Mapping[str, Any], benchmark: Benchmark) -> tuple[float, float | None]:
    value, stderr = score["value"] / benchmark.best, score["stderr"]
    return value, None if stderr is None else stderr / benchmark.best


def _lm_eval_layout(
    folder: Path, entries: Mapping[str, dict[str, Any]], tasks: Tasks, settings: Settings
) -> dict[str, Any]:
    """The file that `lm_eval run --output_path` writes for one model."""
    first = next(iter(entries.values()))
    document = _merge(entries, tasks)
    model = str(folder)
    document["config"] = {
        "model": "hf",
        "model_args": {"pretrained": model, "dtype": settings.dtype},
        **first["model_info"],
        "batch_size": settings.batch_size,
        "batch_sizes": [],
        "device": settings.device,
        "use_cache": None,
        "limit": settings.limit,
        "bootstrap_iters": 100000,
        "gen_kwargs": {},
        "random_seed": 0,
        "numpy_seed": 1234,
        "torch_seed": 1234,
        "fewshot_seed": 1234,
    }
    document |= first["tokenizer_info"] | {"date": time.time()}
    document["task_hashes"] = {
        name: hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in entry["samples"]))
        for name, entry in entries.items()
        if settings.log_samples
    }
    return document | {
        "model_source": "hf",
        "model_name": model,
        "model_name_sanitized": sanitize_model_name(model),
        "system_instruction": None,
        "system_instruction_sha": None,
        "fewshot_as_multiturn": None,
        "chat_template": None,
        "chat_template_sha": None,
    }


def _write_samples(place: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """samples_TASK_DATE.jsonl, as lm-eval writes them; those of an earlier run of the task are deleted."""
    for name, entry in entries.items():
        safe = name.replace("/", "__")
        lines = []
        for sample in entry["samples"]:
            line = sample | {
                "resps": sanitize_list(sample["resps"]),
                "filtered_resps": sanitize_list(sample["filtered_resps"]),
                "arguments": {
                    f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(arguments)}
                    for i, arguments in enumerate(sample["arguments"])
                },
                "target": str(sample["target"]),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        file = place / f"samples_{safe}_{entry['date']}.jsonl"
        write_file(file, "".join(lines).encode("utf-8", "replace"))
        for old in place.glob("samples_*_*.jsonl"):
            if old.name[len("samples_") : old.name.rfind("_")] == safe and old != file:
                old.unlink()
