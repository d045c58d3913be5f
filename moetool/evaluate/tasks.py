"""The questions for the models: lm-eval tasks and local text, loaded before any weights.

Loading a task loads its data set, so missing data is reported first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry
from lm_eval.tasks._yaml_loader import load_yaml

from moetool.data.text import TextSource, read_documents
from moetool.errors import DataError, EvaluationError
from moetool.evaluate.lookup import find, members, one_line
from moetool.progress import Progress, silent

# lm-eval's defaults, so that the same examples are drawn and the same text is generated.
FEWSHOT_SEED = 1234


@dataclass
class Tasks:
    """Loaded tasks.

    Attributes:
        tasks: lm-eval's task objects by name, groups resolved to their members.
        groups: lm-eval's group objects by name.
        failed: tasks that could not be loaded for a reason other than missing data -> the reason.
        texts: names of local texts -> the path they were read from.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def load_tasks(
    requested: Mapping[str, int | None],
    include_path: Path | None = None,
    allow_code_execution: bool = False,
    progress: Progress = silent,
) -> Tasks:
    """Load tasks and their data sets.

    Args:
        requested: name, pattern (`arc_*`) or YAML file of a task, group or tag -> shots, or None for
            the task's own number. As in lm-eval, a task whose number is 0 keeps it.
        include_path: a folder of YAML files that define more tasks.
        allow_code_execution: accept tasks that run code the model writes.
        progress: called with the tasks loaded.

    Raises:
        EvaluationError: an unknown name (with suggestions), a task that runs code, a task in two
            groups, or missing data sets (all of them, by name).
    """
    manager, names = find(requested, include_path)
    if not allow_code_execution and (unsafe := [n for n in names if _unsafe(manager.task_index, n)]):
        raise EvaluationError(_unsafe_message(unsafe))
    found = Tasks()
    absent: list[str] = []
    with network():
        if any(_of_the_hub(_config(manager, leaf)) for name in names for leaf in _leaves(manager, name)):
            _ask_the_hub()
        for done, (name, shots) in enumerate(names.items()):
            progress("load tasks", done, len(names), name)
            try:
                loaded = manager.load([name])
            except Exception as error:  # a task runs its authors' code, and data sets fail in many ways
                if not _data_is_absent(error):
                    found.failed[name] = one_line(error)
                    continue
                if isinstance(error, ConnectionError):
                    _go_offline()  # so that the others fail at once, not after five retries each
                absent += _absent(manager, name)
                continue
            for task_name, task in loaded["tasks"].items():
                if task_name in found.tasks:
                    raise EvaluationError(f"task {task_name} is given twice (also in '{name}'); leave one out")
                _configure(task, shots)
                found.tasks[task_name] = task
            found.groups |= loaded.get("groups") or {}
        progress("load tasks", len(names), len(names))
    if absent:
        raise EvaluationError(
            f"{len(absent)} data set{'s are' if len(absent) > 1 else ' is'} missing: {', '.join(absent)};"
            " run once with a network and copy its Hugging Face cache (HF_HOME) to this machine, or correct the path"
        )
    if not allow_code_execution and (
        unsafe := [n for n, task in found.tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    ):
        raise EvaluationError(_unsafe_message(unsafe))
    return found


def text_task(name: str, source: TextSource, limit: float | None, progress: Progress = silent) -> Any:
    """Local text as an lm-eval task: rolling log-likelihood, reported as bits per byte.

    The documents stay in memory: nothing is written to, or read from, the data set cache.

    Raises:
        DataError: the source cannot be read or holds no documents.
    """
    documents = read_documents(source, progress)
    texts = list(islice(documents, int(limit)) if limit is not None and limit >= 1 else documents)
    if not texts:
        raise DataError(f"{source.path} holds no documents")
    data = {"test": datasets.Dataset.from_dict({"text": texts})}
    task = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: data,
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": _text,
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
            "metadata": {"version": 1.0},
        }
    )
    _configure(task, None)
    return task


def _text(document: dict[str, str]) -> str:
    # A function, not the template "{{text}}": lm-eval would evaluate a text such as "[1, 2]".
    return document["text"]


def describe(task: Any, text_path: str | None = None) -> dict[str, Any]:
    """A task's configuration as lm-eval records it, as plain JSON values."""
    config = dict(task.dump_config())
    if text_path is not None:
        config = {k: v for k, v in config.items() if k not in ("custom_dataset", "doc_to_target", "fewshot_config")}
        config["dataset_path"] = text_path
    document: dict[str, Any] = json.loads(json.dumps(config, default=_plain))
    return document


def digest(task: Any, config: dict[str, Any], limit: float | None) -> str:
    """SHA-256 of everything that defines a task: requests, documents, configuration, code."""
    task.build_all_requests(limit=get_sample_size(task, limit))
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for instance in task.instances:
        request = [instance.request_type, instance.arguments, instance.doc]
        hasher.update(json.dumps(request, sort_keys=True, default=_plain).encode())
    yaml_file = Path(str((config.get("metadata") or {}).get("config_source", "")))
    for module in sorted(yaml_file.parent.glob("*.py")) if yaml_file.suffix == ".yaml" else ():
        hasher.update(module.read_bytes())
    task._instances = None
    return hasher.hexdigest()


def _plain(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else str(value)


def _configure(task: Any, shots: int | None) -> None:
    """Set the number of shots as lm-eval's simple_evaluate does: a task's own 0 is never overridden."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _unsafe(index: Mapping[str, Entry], name: str) -> bool:
    return any((index[leaf].cfg or {}).get("unsafe_code") for leaf in members(index, name))


def _unsafe_message(names: list[str]) -> str:
    return (
        f"{', '.join(names)} would run code that the model writes on this machine;"
        " use a disposable container and add --allow-code-execution"
    )


def _data_is_absent(error: BaseException) -> bool:
    absent = (
        ConnectionError,
        FileNotFoundError,
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DataFilesNotFoundError,
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        huggingface_hub.errors.OfflineModeIsEnabled,
    )
    return isinstance(error, absent) or "Couldn't find cache for" in str(error)


def _absent(manager: TaskManager, name: str) -> list[str]:
    """Each task under a name whose data is missing, with its data set."""
    leaves = _leaves(manager, name)
    absent = []
    for leaf in leaves:
        if len(leaves) > 1:
            try:
                manager.load([leaf])
                continue
            except Exception as error:
                if not _data_is_absent(error):
                    continue
        config = _config(manager, leaf)
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        files = [str(file) for file in files.values()] if isinstance(files, dict) else [str(files or "")]
        data = ", ".join(file for file in files if file) or str(config.get("dataset_path", ""))
        absent.append(f"{leaf} ({data})" if data else leaf)
    return absent or [name]


def _leaves(manager: TaskManager, name: str) -> list[str]:
    return list(members(manager.task_index, name)) or [name]


def _config(manager: TaskManager, leaf: str) -> dict[str, Any]:
    if leaf.endswith(".yaml"):
        return dict(load_yaml(leaf, resolve_func=False))
    entry = manager.task_index.get(leaf)
    return (entry.cfg if entry else None) or {}


def _of_the_hub(config: Mapping[str, Any]) -> bool:
    """Whether a task's data may come from the hub: not a folder, and not files that the task lists."""
    path = str(config.get("dataset_path", ""))
    return path not in _PACKAGED_DATASETS_MODULES and not Path(path).is_dir()


def _ask_the_hub() -> None:
    """Go offline if the hub does not answer; otherwise the libraries try for half a minute per data set."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except Exception:  # no network, no such host, a certificate: any error of the client
        _go_offline()


@contextmanager
def network(allowed: bool = True) -> Iterator[None]:
    """Without permission, libraries inside this block use only caches, not the network."""
    modules = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not allowed:
        _go_offline()
    try:
        with _set() if allowed else _set("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


@contextmanager
def code_execution(allowed: bool) -> Iterator[None]:
    """With permission, the hub's metric `code_eval` runs code that models write inside this block."""
    with _set("HF_ALLOW_CODE_EVAL") if allowed else _set():
        yield


@contextmanager
def _set(*names: str) -> Iterator[None]:
    """Set environment variables to "1" inside this block."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, text in before.items():
            os.environ.pop(name, None)
            if text is not None:
                os.environ[name] = text


def _go_offline() -> None:
    # These read the environment when they were imported.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
