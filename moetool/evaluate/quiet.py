"""Keep the output of libraries off the user's screen."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

_LOUD = ("lm_eval", "transformers", "datasets", "huggingface_hub", "accelerate", "evaluate", "httpx", "filelock")


class _Nowhere(io.TextIOBase):
    """A stream that drops its input; `rich` still finds the real stream behind it."""

    def __init__(self, real: object) -> None:
        # rich draws its progress bars on this attribute of sys.stderr, if there is one.
        self.rich_proxied_file = getattr(real, "rich_proxied_file", real)

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Drop stdout, stderr, log lines and warnings, except moetool's own progress bars."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with (
            contextlib.redirect_stdout(_Nowhere(sys.stdout)),
            contextlib.redirect_stderr(_Nowhere(sys.stderr)),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
