"""Untrusted documents and names: read with a limit on everything, printed so that they cannot control a terminal."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.errors import CheckpointError, MoetoolError

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_JSON = 50_000_000  # bytes of a config.json, an index, a lineage
MAX_DEPTH = 100  # of nested brackets; Python's own recursion ends at a few hundred, at unpredictable places
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, direction and half characters, line and paragraph breaks


def printable(text: str) -> str:
    r"""Text in which every character that could control a terminal is escaped: `\x1b`, `\u202e`, `\n`."""
    if text.isprintable():
        return text
    return "".join(_written_out(c) if unicodedata.category(c) in _ACTING else c for c in text)


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


_NOT_ASCII = re.compile(r"[^\x00-\x7e]")


def printable_json(text: str) -> str:
    """A JSON document with the same value, in which such characters are escaped."""
    return _NOT_ASCII.sub(lambda m: json.dumps(m[0])[1:-1] if unicodedata.category(m[0]) in _ACTING else m[0], text)


def safe_json(value: Any) -> str:
    """JSON that may stand inside an HTML script element, whatever strings it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: other characters are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def templates(folder: Path) -> Environment:
    """The templates of a page, which escape every value that they show and refuse names without a value."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(folder)
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def finite(value: Any) -> Any:
    """A JSON document in which NaN and infinity, which JSON does not know, are null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_bytes(
    path: Path, limit: int = MAX_JSON, error: type[MoetoolError] = CheckpointError, pipe: bool = False
) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Args:
        path: followed if it is a link.
        limit: in bytes; no more is read.
        error: the class of error to raise.
        pipe: whether it may be something other than a regular file. A path that the user typed may be a
            pipe; a file in a checkpoint may not (a pipe blocks, a device has no end).

    Raises:
        MoetoolError: absent, unreadable, too large, or a pipe or device; its class is `error`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if pipe else os.O_NONBLOCK))
        with open(descriptor, "rb") as file:
            if not pipe and not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise error(f"{path} is a pipe, a device or a folder, not a file; put the file in its place")
            size = limit if pipe else min(limit, os.fstat(descriptor).st_size)
            data = file.read(size + 1)
    except OSError as failed:
        raise error(f"{path}: {os.strerror(failed.errno or errno.EIO).lower()}") from None
    except ValueError:  # a NUL or half a character in its name
        raise error(f"{path} is not a valid file name; check the path") from None
    if len(data) > limit:
        raise error(f"{path} is larger than {limit} bytes, the limit for such a file; check the path")
    return data


def parse_json(raw: bytes, where: str, error: type[MoetoolError] = CheckpointError) -> Any:
    """Parse a JSON document.

    Raises:
        MoetoolError: not UTF-8, not JSON, or nested deeper than MAX_DEPTH; its class is `error`.
    """
    try:
        document = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as failed:
        raise error(f"{where} is not valid JSON: {str(failed)[:200]}") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        level = [document]
        for _ in range(MAX_DEPTH):
            inner = (list(o.values()) if isinstance(o, dict) else o for o in level if isinstance(o, (dict, list)))
            level = [o for values in inner for o in values if isinstance(o, (dict, list))]
            if not level:
                return document
        raise error(f"{where} is nested more than {MAX_DEPTH} levels deep; check that it is the right file")
    return document


def read_json(path: Path, error: type[MoetoolError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object from a regular file.

    Raises:
        MoetoolError: see `read_bytes` and `parse_json`, or not an object; its class is `error`.
    """
    document = parse_json(read_bytes(path, error=error), str(path), error)
    if not isinstance(document, dict):
        raise error(f"{path} holds a JSON {type(document).__name__}, not an object")
    return document


def fits(value: Any, shape: Any) -> bool:
    """Whether a document has the parts that its reader relies on.

    Args:
        value: a value of a JSON document.
        shape: a type (object: anything; int and float: a number below 2^63, but not True); a tuple of
            shapes, one of which must fit; a list of one shape, for a list of at least one item, all of that
            shape; a dict of required keys and their shapes, where `"*"` stands for every key.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        named = all(key in value and fits(value[key], inner) for key, inner in shape.items() if key != "*")
        return named and ("*" not in shape or all(fits(item, shape["*"]) for item in value.values()))
    if isinstance(shape, list):
        return isinstance(value, list) and bool(value) and all(fits(item, shape[0]) for item in value)
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if shape is object:
        return True
    if shape in (int, float):
        return type(value) in (int, shape) and not abs(value) >= 2**63
    return type(value) is shape
