"""Unexpected errors in words."""

from __future__ import annotations

import traceback
from pathlib import Path

from moetool.outside import printable


def in_words(error: Exception) -> str:
    """An error and where it was raised, in one line, which the page shows instead of a traceback."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return printable(f"{type(error).__name__}{place}: {error}"[:300].rstrip(": "))
