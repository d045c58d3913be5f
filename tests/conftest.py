"""Fixtures shared by all tests: tiny models made once a session, and a cache of their own."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# How long an example takes says more about the machine than about moetool.
hypothesis.settings.register_profile("moetool", deadline=None)
hypothesis.settings.load_profile("moetool")

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread each, set before torch is imported: workers of one run share the cores, and what a test
# compares with a process of its own must be computed with as many threads.
os.environ["OMP_NUM_THREADS"] = "1"
# What is written is synced, which takes 5 to 10 ms a file on a disk, and none in memory, if there is enough.
MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 8e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
# A shell's background job ignores Ctrl-C, and would hand that on to the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# As in moetool's own processes (moetool/__main__.py): what imports make is not searched for garbage, here until the
# tests begin.
gc.disable()

from tests import tiny  # noqa: E402  (after the environment is set)

_imported = [0]  # modules when garbage was last told from what stays


def pytest_collection_finish() -> None:
    """Search for garbage among what tests make, not among modules and the tests themselves."""
    _imported[0] = len(sys.modules)
    gc.freeze()
    gc.enable()


def pytest_runtest_teardown() -> None:
    """Nor among the modules that a test was the first to import, if they are many."""
    if len(sys.modules) > _imported[0] + 200:
        gc.collect()
        pytest_collection_finish()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache, in fixtures of whole modules neither."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOETOOL_CACHE", str(tmp_path_factory.getbasetemp() / "moetool-cache"))
        patched.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint with a tokenizer; never modify it."""
    return tiny.save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mixtral checkpoint (4 experts, top-2) with a tokenizer; never modify it."""
    return tiny.save_mixtral(tmp_path_factory.mktemp("models") / "mixtral")


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Eighty short documents as JSONL."""
    return tiny.save_jsonl(tmp_path / "text.jsonl")
