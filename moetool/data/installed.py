"""A corpus on every machine with moetool: the prose and the code of the installed Python.

Prose is the sentences of the documentation (the language reference behind `help()`, and docstrings). Code is the
standard library without its docstrings, so the two share no text. One document is one module.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from moetool.errors import DataError
from moetool.progress import Progress, silent

# Sources of prose, in this order, until there is enough: the standard library, then moetool's dependencies.
PACKAGES = ("numpy", "pandas", "transformers", "torch")
# Markup, doctests, tables and parameter lists are not prose.
_MARKUP = re.compile(r">>>|^\s*\.\. |^\s*[-=~]{3,}|::|\||\{|\}|```", re.MULTILINE)
_WORD = re.compile(r"^[A-Z]?[a-z']*[,.;:]?$")
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def prose(limit: int, progress: Progress = silent) -> list[str]:
    """English paragraphs of the installed documentation, one document per module.

    Args:
        limit: characters after which to stop.
        progress: called with characters read.
    """
    documents: list[str] = []
    seen: set[str] = set()
    size = 0
    for texts in _documentation():
        fresh = [p for text in texts for p in paragraphs(text) if p not in seen]
        seen.update(fresh)
        document = "\n\n".join(dict.fromkeys(fresh))
        if len(document) < 200:
            continue
        documents.append(document)
        size += len(document)
        progress("collecting prose", min(size, limit), limit)
        if size >= limit:
            break
    return documents


def code(limit: int, progress: Progress = silent) -> list[str]:
    """Modules of the standard library without their docstrings, chosen by a hash."""
    documents: list[str] = []
    size = 0
    for path in sorted(_modules(_library()), key=lambda path: hashlib.sha256(path.name.encode()).digest()):
        text = without_docstrings(_read(path))
        if not 500 < len(text) < 60_000:
            continue
        documents.append(text)
        size += len(text)
        progress("collecting code", min(size, limit), limit)
        if size >= limit:
            break
    return documents


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _modules(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(part in ("site-packages", "dist-packages") or "test" in part for part in parts):
            yield path


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _documentation() -> Iterator[list[str]]:
    """The texts of each module in turn."""
    from pydoc_data.topics import topics

    for topic in topics.values():
        yield [topic]
    roots = [_library()]
    for package in PACKAGES:
        spec = find_spec(package)
        if spec and spec.submodule_search_locations:
            roots.append(Path(spec.submodule_search_locations[0]))
    for root in roots:
        for path in _modules(root):
            yield docstrings(_read(path))


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def docstrings(text: str) -> list[str]:
    """All docstrings of a module's source, in no particular order; none if it does not parse."""
    tree = _parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)] if tree else []
    return [found for node in nodes if (found := ast.get_docstring(node))]


def paragraphs(text: str) -> list[str]:
    """The paragraphs that are sentences: long enough, mostly plain words, no markup."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if len(words) < 12 or not words[0][0].isupper() or _MARKUP.search(paragraph):
            continue
        if sum(bool(_WORD.match(word)) for word in words) >= 0.8 * len(words):
            kept.append(" ".join(words))
    return kept


def without_docstrings(text: str) -> str:
    """A module's source with the lines of its docstrings left out; empty if it does not parse."""
    tree = _parse(text)
    if tree is None:
        return ""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            for number in range(first.lineno - 1, first.end_lineno or first.lineno):
                lines[number] = ""
    return "".join(lines)


def split(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Train and validation documents, split by each document's hash, so the split never changes.

    Raises:
        DataError: there is too little to split.
    """
    order = sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())
    held = max(1, round(share * len(order)))
    if len(order) < 2 * held:
        raise DataError(f"only {len(order)} documents in the installed Python; install its whole standard library")
    return order[held:], order[:held]
